//! What this machine builds for beside its own system, when nobody says: programs for 32 bits, and for each level of its
//! processor (Nix: globals.cc, computeLevels). Pure but for the processor's own word.

/// Systems beside the native one, in Nix's words.
pub(crate) fn extra() -> Vec<String> {
    #[cfg(target_arch = "x86_64")]
    {
        let levels = (1..=level()).map(|level| format!("x86_64-v{level}-linux"));
        std::iter::once("i686-linux".to_owned()).chain(levels).collect()
    }
    #[cfg(not(target_arch = "x86_64"))]
    Vec::new()
}

/// The highest level of the x86-64 psABI that this processor has all features of. The detection includes whether the
/// kernel saves the registers that come with them.
#[cfg(target_arch = "x86_64")]
fn level() -> u32 {
    use std::arch::is_x86_feature_detected as has;
    // LAHF/SAHF in 64-bit mode has no name here; every processor with the others has it.
    let second = has!("cmpxchg16b")
        && has!("popcnt")
        && has!("sse3")
        && has!("ssse3")
        && has!("sse4.1")
        && has!("sse4.2");
    let third = second
        && has!("avx")
        && has!("avx2")
        && has!("bmi1")
        && has!("bmi2")
        && has!("f16c")
        && has!("fma")
        && has!("lzcnt")
        && has!("movbe");
    let fourth = third
        && has!("avx512f")
        && has!("avx512bw")
        && has!("avx512cd")
        && has!("avx512dq")
        && has!("avx512vl");
    1 + u32::from(second) + u32::from(third) + u32::from(fourth)
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[test]
    fn levels_are_the_processors() {
        let systems = extra();
        assert_eq!(systems[..2], ["i686-linux", "x86_64-v1-linux"]);
        // The kernel names some of what decides.
        let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let flags = flags.lines().find(|line| line.starts_with("flags")).unwrap();
        let has = |flag: &str| flags.split_whitespace().any(|word| word == flag);
        for (level, flag) in [(2, "sse4_2"), (3, "avx2"), (4, "avx512vl")] {
            let ours = systems.contains(&format!("x86_64-v{level}-linux"));
            assert!(!ours || has(flag), "{level}: {flags}");
        }
        assert_eq!(
            systems.contains(&"x86_64-v3-linux".to_owned()),
            has("avx2") && has("bmi2") && has("fma") && has("movbe") && has("abm") && has("f16c")
        );
    }
}
