//! Chains made here, and some files of real Nix. The corpus of real Nix is in the layer `peers`.

use std::collections::BTreeSet;
use std::convert::Infallible;

use bstr::ByteSlice as _;

use super::*;
use crate::DerivationOutput;

type Files = BTreeMap<StorePath, Vec<u8>>;

fn basic(name: &str) -> BasicDerivation {
    BasicDerivation {
        name: name.into(),
        outputs: BTreeMap::from([(OutputName::out(), DerivationOutput::Deferred)]),
        input_srcs: BTreeSet::new(),
        system: "x86_64-linux".into(),
        builder: "/bin/sh".into(),
        args: vec!["-c".into()],
        env: BTreeMap::from([("out".into(), "".into()), ("name".into(), name.into())]),
    }
}

/// Adds a derivation with its right paths to the files, and says where it is.
fn add(files: &mut Files, proven: &mut Proven, name: &str, inputs: &[&StorePath]) -> StorePath {
    let dir = StoreDir::default();
    let out = || BTreeSet::from([OutputName::out()]);
    let mut drv = Derivation {
        basic: basic(name),
        input_drvs: inputs.iter().map(|path| ((*path).clone(), out())).collect(),
    };
    let mut input = |path: &StorePath| proven.input_hash(path);
    let path = modulo::output_paths(&dir, &drv, &mut input).unwrap().unwrap()["out"].clone();
    drv.basic.env.insert("out".into(), dir.full(&path).into());
    drv.basic.outputs.insert(OutputName::out(), DerivationOutput::InputAddressed(path));
    let drv_path = modulo::drv_path(&dir, &drv).unwrap();
    files.insert(drv_path.clone(), aterm::print(&dir, &drv).unwrap());
    prove(proven, files, &drv_path).unwrap();
    drv_path
}

fn prove(proven: &mut Proven, files: &Files, root: &StorePath) -> Result<(), ProofError<Infallible>> {
    proven.prove(&StoreDir::default(), root, &mut |path| Ok(files.get(path).cloned()))
}

/// A chain of three and its files.
fn chain() -> (Files, [StorePath; 3]) {
    let (mut files, mut proven) = (Files::new(), Proven::default());
    let bottom = add(&mut files, &mut proven, "bottom", &[]);
    let middle = add(&mut files, &mut proven, "middle", &[&bottom]);
    let top = add(&mut files, &mut proven, "top", &[&middle, &bottom]);
    (files, [bottom, middle, top])
}

#[test]
fn a_closure_is_proven_and_resolved() {
    let (files, [bottom, middle, top]) = chain();
    let mut proven = Proven::default();
    prove(&mut proven, &files, &top).unwrap();
    let request = proven.resolve(&StoreDir::default(), &top).unwrap();
    let outputs: BTreeSet<_> =
        [&bottom, &middle].map(|drv| proven.output_path(drv, &OutputName::out()).unwrap()).into();
    assert_eq!(request.input_srcs, outputs);
    proven.entitles(&StoreDir::default(), &top, &request, &BTreeSet::new()).unwrap();
    // What was proven once is not read again.
    prove(&mut proven, &Files::new(), &top).unwrap();
}

#[test]
fn any_change_of_a_request_is_found() {
    let dir = StoreDir::default();
    let (files, [bottom, _, top]) = chain();
    let mut proven = Proven::default();
    prove(&mut proven, &files, &top).unwrap();
    let request = proven.resolve(&StoreDir::default(), &top).unwrap();
    let foreign = proven.output_path(&bottom, &OutputName::out()).unwrap();
    type Lie = (&'static str, Box<dyn Fn(&mut BasicDerivation)>);
    let lies: Vec<Lie> = vec![
        ("name", Box::new(|drv| drv.name.push('x'))),
        ("system", Box::new(|drv| drv.system = "i686-linux".into())),
        ("builder", Box::new(|drv| drv.builder = "/bin/bash".into())),
        ("args", Box::new(|drv| drv.args.push("x".into()))),
        ("env.name", Box::new(|drv| drop(drv.env.remove(b"name".as_slice())))),
        ("env.new", Box::new(|drv| drop(drv.env.insert("new".into(), "".into())))),
        ("inputSrcs", Box::new(|drv| drop(drv.input_srcs.pop_first()))),
        ("inputSrcs", {
            let top = top.clone();
            Box::new(move |drv| drv.input_srcs.extend([top.clone()]))
        }),
        (
            "outputs",
            Box::new(move |drv| {
                drv.outputs.insert(OutputName::out(), DerivationOutput::InputAddressed(foreign.clone()));
            }),
        ),
    ];
    for (expected, lie) in lies {
        let mut request = request.clone();
        lie(&mut request);
        match proven.entitles(&dir, &top, &request, &BTreeSet::new()) {
            Err(ProofError::Differs { field, .. }) => assert_eq!(field, expected),
            other => panic!("{expected}: {other:?}"),
        }
    }
    // An input more is no lie if the inputs refer to it anyway.
    let mut more = request;
    more.input_srcs.insert(top.clone());
    proven.entitles(&dir, &top, &more, &BTreeSet::from([top.clone()])).unwrap();
}

#[test]
fn forged_files_prove_nothing() {
    let (files, [bottom, middle, top]) = chain();
    let mut missing = files.clone();
    missing.remove(&bottom);
    assert!(
        matches!(prove(&mut Proven::default(), &missing, &top), Err(ProofError::Missing(path)) if path == bottom)
    );

    let mut swapped = files.clone();
    swapped.insert(middle, files[&bottom].clone());
    assert!(matches!(prove(&mut Proven::default(), &swapped, &top), Err(ProofError::Name { .. })));

    // The same derivation, and a name of its own, but not the text that paths are made of.
    let dir = StoreDir::default();
    let respelled = files[&bottom].replacen("(\"name\"", "(\"na\\me\"", 1);
    let drv = aterm::parse(&dir, "bottom", &respelled).unwrap();
    assert_eq!(drv, aterm::parse(&dir, "bottom", &files[&bottom]).unwrap());
    let own = modulo::text_path(&dir, &drv, &respelled).unwrap();
    let spelled = Files::from([(own.clone(), respelled)]);
    assert!(
        matches!(prove(&mut Proven::default(), &spelled, &own), Err(ProofError::Spelling(path)) if path == own)
    );

    // Right by its name, but its output is somebody else's: the name alone does not entitle.
    let mut drv = aterm::parse(&dir, "bottom", &files[&bottom]).unwrap();
    let foreign = StorePath::from_parts([7; 20], "bottom").unwrap();
    drv.basic.env.insert("out".into(), dir.full(&foreign).into());
    drv.basic.outputs.insert(OutputName::out(), DerivationOutput::InputAddressed(foreign));
    let liar = modulo::drv_path(&dir, &drv).unwrap();
    let files = Files::from([(liar.clone(), aterm::print(&dir, &drv).unwrap())]);
    assert!(matches!(prove(&mut Proven::default(), &files, &liar), Err(ProofError::Path { .. })));
}

#[test]
fn closures_with_floating_outputs_below() {
    // Of real Nix: `fixed` depends on `base`, whose outputs' paths follow from their content.
    let real = |name: &str, text: &[u8]| (name.parse::<StorePath>().unwrap(), text.to_vec());
    let (base, base_text) = real(
        "7papim1jhqjlq8kcsnwmjyxbdgmw9pgv-base.drv",
        include_bytes!("../../../testdata/content-addressed/7papim1jhqjlq8kcsnwmjyxbdgmw9pgv-base.drv"),
    );
    let (fixed, fixed_text) = real(
        "ssqnvrc6cpwwl3csijv225ns3zqipp42-fixed.drv",
        include_bytes!("../../../testdata/content-addressed/ssqnvrc6cpwwl3csijv225ns3zqipp42-fixed.drv"),
    );
    let mut files = Files::from([(base.clone(), base_text), (fixed.clone(), fixed_text)]);
    let mut proven = Proven::default();
    prove(&mut proven, &files, &fixed).unwrap();
    // What depends on the fixed one has a path that can be proven.
    let top = add(&mut files, &mut proven, "top", &[&fixed]);
    let request = proven.resolve(&StoreDir::default(), &top).unwrap();
    let input = "w0fkqvh6w58g3lwp5v8mwyhh92vf18j5-fixed".parse().unwrap();
    assert_eq!(request.input_srcs, [input].into());
    // What depends on the floating one has not, whatever it claims.
    let dir = StoreDir::default();
    let mut drv =
        Derivation { basic: basic("liar"), input_drvs: [(base, [OutputName::out()].into())].into() };
    let foreign = StorePath::from_parts([7; 20], "liar").unwrap();
    drv.basic.outputs.insert(OutputName::out(), DerivationOutput::InputAddressed(foreign));
    let liar = modulo::drv_path(&dir, &drv).unwrap();
    files.insert(liar.clone(), aterm::print(&dir, &drv).unwrap());
    assert!(matches!(prove(&mut proven, &files, &liar), Err(ProofError::Deferred { .. })));
}

#[test]
fn a_request_alone() {
    let dir = StoreDir::default();
    let mut drv = basic("alone");
    assert!(matches!(prove_alone(&dir, &drv), Err(ProofError::Deferred { .. })));
    let path = modulo::basic_output_paths(&dir, &drv).unwrap()["out"].clone();
    drv.env.insert("out".into(), dir.full(&path).into());
    drv.outputs.insert(OutputName::out(), DerivationOutput::InputAddressed(path));
    prove_alone(&dir, &drv).unwrap();
    let mut changed = drv.clone();
    changed.args.push("changed".into());
    assert!(matches!(prove_alone(&dir, &changed), Err(ProofError::Path { .. })));
    // What the paths are made of leaves these values out.
    let mut led_astray = drv.clone();
    led_astray.env.insert("out".into(), "/nix/store/i00sflxqsj37lfmf95m8mn0grv615hpj-alone".into());
    let computed = modulo::basic_output_paths(&dir, &led_astray).unwrap();
    assert_eq!(computed, modulo::basic_output_paths(&dir, &drv).unwrap());
    match prove_alone(&dir, &led_astray) {
        Err(ProofError::Variable { output, .. }) => assert_eq!(output, OutputName::out()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_chain_of_five_thousand() {
    let (mut files, mut proven) = (Files::new(), Proven::default());
    let mut last = add(&mut files, &mut proven, "d", &[]);
    for _ in 1..5000 {
        last = add(&mut files, &mut proven, "d", &[&last]);
    }
    let mut afresh = Proven::default();
    prove(&mut afresh, &files, &last).unwrap();
    assert_eq!(afresh.len(), 5000);
}

#[test]
fn what_was_not_used_for_longest_is_forgotten_and_proven_again() {
    let dir = StoreDir::default();
    let (mut files, mut scratch) = (Files::new(), Proven::default());
    let used = add(&mut files, &mut scratch, "used", &[]);
    let above = add(&mut files, &mut scratch, "above", &[&used]);
    let others: Vec<_> = (0..20).map(|i| add(&mut files, &mut scratch, &format!("other-{i}"), &[])).collect();
    let mut proven = Proven::keeping(10);
    for other in &others {
        prove(&mut proven, &files, other).unwrap();
        prove(&mut proven, &files, &above).unwrap();
        assert!(proven.len() <= 13, "{}", proven.len());
    }
    // It has been of use all the time, its file too: nothing is read.
    prove(&mut proven, &Files::new(), &above).unwrap();
    proven.resolve(&dir, &above).unwrap();
    assert!(!proven.knows(&others[0]) && proven.knows(&others[19]));
    prove(&mut proven, &files, &others[0]).unwrap();
    // Nor does one proof forget what it needs itself.
    let mut last = add(&mut files, &mut scratch, "chain", &[]);
    for _ in 0..100 {
        last = add(&mut files, &mut scratch, "chain", &[&last]);
    }
    prove(&mut proven, &files, &last).unwrap();
    proven.resolve(&dir, &last).unwrap();
}

#[test]
fn whole_derivations_are_kept_within_bounds() {
    let (mut files, mut proven) = (Files::new(), Proven::default());
    let first = add(&mut files, &mut proven, "first", &[]);
    assert!(proven.is_ready(&first));
    for number in 0..2000 {
        add(&mut files, &mut proven, &format!("more-{number}"), &[]);
    }
    // Its paths stay proven; to compare a request with it, it is read again.
    assert!(proven.knows(&first) && !proven.is_ready(&first));
    assert!(matches!(proven.resolve(&StoreDir::default(), &first), Err(ProofError::Missing(_))));
    prove(&mut proven, &files, &first).unwrap();
    proven.resolve(&StoreDir::default(), &first).unwrap();
}
