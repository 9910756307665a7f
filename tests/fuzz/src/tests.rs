//! Every target on its seeds, on each of them cut short, and on every input that once broke it.

use super::*;

#[global_allocator]
static MEMORY: Counting = Counting;

#[test]
fn targets_hold_on_their_seeds() {
    for target in &TARGETS {
        let seeds = target.all_seeds(None).unwrap();
        assert!(seeds.len() > 1, "{}", target.name);
        seeds.iter().for_each(|seed| target.run(seed));
    }
}

#[test]
fn targets_hold_on_cut_and_changed_seeds() {
    for target in &TARGETS {
        for seed in target.all_seeds(None).unwrap().iter().filter(|seed| seed.len() < 5000) {
            // All cuts of short seeds, and of long ones those that a step of 7 hits: every place within a word.
            let step = if seed.len() < 600 { 1 } else { 7 };
            (0..seed.len()).step_by(step).for_each(|len| target.run(&seed[..len]));
            let mut changed = seed.clone();
            for at in (0..seed.len()).step_by(step) {
                for value in [0, 1, 0xff, seed[at] ^ 0x80] {
                    changed[at] = value;
                    target.run(&changed);
                }
                changed[at] = seed[at];
            }
        }
    }
}

#[test]
fn memory_is_counted() {
    let peak = memory::peak(|| drop(vec![1u8; 100_000]));
    assert!((100_000..110_000).contains(&peak), "{peak}");
}

#[test]
#[should_panic(expected = "bytes of memory")]
fn a_target_that_believes_lengths_is_found_out() {
    let target = Target {
        name: "believer",
        check: |data| {
            let claimed = usize::from(data[0]) << 20;
            drop(std::hint::black_box(Vec::<u8>::with_capacity(claimed)));
        },
        seeds: Vec::new,
        fixed_memory: 1 << 10,
        memory_per_byte: 64,
    };
    target.run(&[255]);
}

#[test]
fn hexadecimal_text() {
    let bytes: Vec<u8> = (0..=255).collect();
    assert_eq!(from_hex(&to_hex(&bytes)), Some(bytes));
    assert_eq!(from_hex("# why\n00 ff\n"), Some(vec![0, 255]));
    assert!(from_hex("0").is_none() && from_hex("xx").is_none());
}
