//! Nix expressions with derivations of every kind and shape, made from a seed: the same text for the same seed.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;

/// What a Nix knows of what is younger than its oldest supported release.
#[derive(Clone, Copy, Debug)]
pub(super) struct Knows {
    /// Objects that are hashed as git does it.
    pub git: bool,
    /// Objects that are text with references.
    pub text: bool,
}

/// Which derivation a random choice wants: one whose paths are known, or any.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Below {
    /// Nothing that floats is below it.
    Known,
    Any,
}

/// How many derivations of random shape there are, chains apart.
const RANDOM: usize = 360;
/// Length of the chain.
const CHAIN: usize = 220;
/// Levels of the diamond, two derivations each, so that it has 2^LEVELS ways from top to bottom.
const LEVELS: usize = 24;

/// Names that may begin a derivation's name or follow its first letter.
const ODD_NAMES: [&str; 10] = ["+", "a+b", "c.d", "e_f", "g?h", "i=j", "k-l", "_", "1.2.3", "=?=-+.x"];
/// Beside `out`; none of these is a keyword, all can be attributes in quotes.
const OUTPUTS: [&str; 20] = [
    "out", "dev", "lib", "man", "doc", "bin", "info", "a+b", "o.1", "x_y", "q?z", "e=f", "m-n", "debug",
    "static", "Z", "0", "devdoc", "test", "py",
];
/// Bytes in arguments and values, as they stand between `''` of an indented string; Nix knows no NUL.
const ODD_TEXT: [&[u8]; 16] = [
    b"",
    b" ",
    b"plain",
    b"\"quoted\"",
    b"back\\slash\\n\\",
    b"two\nlines\n",
    b"tab\tand\rreturn\r\n",
    b"'single'",
    b"$HOME and ,][)(",
    "\u{e9}\u{1f980}\u{2028}".as_bytes(),
    b"\x01\x1f\x7f",
    b"\xff\xfe invalid \xc3",
    b"Derive([(\"out\",\"\",\"\",\"\")",
    b"/nix/store/",
    b"/nix/store/eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee-x",
    b"--flag=a b",
];

struct Random(u64);

impl Random {
    /// SplitMix64.
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    fn hex(&mut self, bytes: usize) -> String {
        (0..bytes).map(|_| format!("{:02x}", self.next() as u8)).collect()
    }
}

/// A derivation that others can refer to.
struct Node {
    /// The expression's name for it.
    name: String,
    outputs: Vec<&'static str>,
    /// Its own paths and all below it are known before anything is built.
    known: bool,
    /// Nothing that is not impure itself may use it.
    impure: bool,
}

struct Generator {
    random: Random,
    knows: Knows,
    /// The bindings of a `let`.
    text: Vec<u8>,
    nodes: Vec<Node>,
}

/// Writes the sources that [`expression`] names into a directory that the Nix sees.
pub(super) fn sources(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir.join("tree/empty"))?;
    std::fs::write(dir.join("tree/file"), "a file\n")?;
    std::os::unix::fs::symlink("file", dir.join("tree/link"))?;
    std::fs::write(dir.join("script.sh"), "#!/bin/sh\nexit 0\n")?;
    Ok(())
}

/// An expression for a list of `{ drv, outputs }`: what Nix itself says of each derivation, placeholders where it does not
/// know a path. `dir` has the [`sources`].
pub(super) fn expression(seed: u64, knows: Knows, dir: &Path) -> Vec<u8> {
    let mut generator = Generator { random: Random(seed), knows, text: Vec::new(), nodes: Vec::new() };
    generator.prelude(dir);
    generator.fixed_in_three_ways();
    generator.every_output();
    generator.every_fixed();
    for _ in 0..RANDOM {
        generator.any();
    }
    generator.chain();
    generator.diamond();
    generator.finish()
}

impl Generator {
    fn prelude(&mut self, dir: &Path) {
        let dir = dir.display();
        let text = format!(
            r#"let
  d = a: derivation ({{ system = "x86_64-linux"; builder = "/bin/sh"; }} // a);
  tree = {dir}/tree;
  script = {dir}/script.sh;
  named = builtins.path {{ name = "a+odd.name_?="; path = {dir}/script.sh; }};
  flat = builtins.path {{ name = "flat"; path = {dir}/script.sh; recursive = false; }};
  note = builtins.toFile "note" "plain text\n";
  above-note = builtins.toFile "above-note" "${{note}} and ${{flat}}\n";
"#
        );
        self.text.extend_from_slice(text.as_bytes());
    }

    /// One content, fetched in several ways, and the same derivation above each of them, which so has one path.
    fn fixed_in_three_ways(&mut self) {
        let mut text = String::new();
        for way in ["one", "another", "a third"] {
            let name = format!("n{}", self.nodes.len());
            let _ = writeln!(
                text,
                r#"  {name} = d {{ name = "fetched"; outputHashMode = "flat"; outputHashAlgo = "sha256"; way = "{way}";
    outputHash = builtins.hashString "sha256" "fetched"; }};"#
            );
            self.nodes.push(Node { name: name.clone(), outputs: vec!["out"], known: true, impure: false });
            let above = format!("n{}", self.nodes.len());
            let _ = writeln!(
                text,
                r#"  {above} = d {{ name = "above-fetched"; outputs = [ "out" "dev" ]; fetched = {name}; }};"#
            );
            self.nodes.push(Node { name: above, outputs: vec!["out", "dev"], known: true, impure: false });
        }
        self.text.extend_from_slice(text.as_bytes());
    }

    fn every_output(&mut self) {
        self.begin(OUTPUTS.to_vec(), true, false);
        self.body(Below::Known);
        self.end();
    }

    /// Every method with every hash that it may have.
    fn every_fixed(&mut self) {
        for (algo, bytes) in [("md5", 16), ("sha1", 20), ("sha256", 32), ("sha512", 64)] {
            for mode in ["flat", "recursive", "git", "text"] {
                let known = match mode {
                    "git" => self.knows.git && algo == "sha1",
                    "text" => self.knows.text && algo == "sha256",
                    _ => true,
                };
                if known {
                    self.begin(vec!["out"], true, false);
                    let hash = self.random.hex(bytes);
                    self.put(&format!(
                        "outputHashMode = \"{mode}\"; outputHashAlgo = \"{algo}\"; outputHash = \"{hash}\";"
                    ));
                    self.body(Below::Known);
                    self.end();
                }
            }
        }
    }

    /// Each uses the one before it, some more than once and by other outputs.
    fn chain(&mut self) {
        let mut text = String::new();
        for link in 0..CHAIN {
            let name = format!("n{}", self.nodes.len());
            let below = match link {
                0 => "note".to_owned(),
                _ => format!("n{}", self.nodes.len() - 1),
            };
            let more = match link % 7 {
                3 if link > 0 => {
                    format!(r#"again = [ {below}.dev {below}.out ]; PATH = "${{{below}.dev}}/bin";"#)
                }
                5 => format!(r#"source = above-note; number = {link};"#),
                _ => String::new(),
            };
            let _ = writeln!(
                text,
                r#"  {name} = d {{ name = "link"; outputs = [ "dev" "out" ]; args = [ "-c" "echo ${{{below}}}" ]; {more} }};"#
            );
            self.nodes.push(Node { name, outputs: vec!["dev", "out"], known: true, impure: false });
        }
        self.text.extend_from_slice(text.as_bytes());
    }

    /// Two on each level, both of which use both of the level below.
    fn diamond(&mut self) {
        let mut text = String::new();
        let mut below = ["note".to_owned(), "tree".to_owned()];
        for level in 0..LEVELS {
            let names = [0, 1].map(|side| format!("n{}", self.nodes.len() + side));
            for (side, name) in names.iter().enumerate() {
                let [left, right] = &below;
                let _ = writeln!(
                    text,
                    r#"  {name} = d {{ name = "side-{side}"; level = {level}; left = "${{{left}}}"; args = [ "${{{right}}}" ]; }};"#
                );
                self.nodes.push(Node {
                    name: name.clone(),
                    outputs: vec!["out"],
                    known: true,
                    impure: false,
                });
            }
            below = names;
        }
        self.text.extend_from_slice(text.as_bytes());
    }

    fn any(&mut self) {
        match self.random.below(12) {
            0..=1 => self.fixed(),
            2..=3 => self.floating(),
            4 if self.random.one_in(3) => self.impure(),
            5 => self.plain(Below::Any),
            6..=7 => self.structured(),
            _ => self.plain(Below::Known),
        }
    }

    fn begin(&mut self, outputs: Vec<&'static str>, known: bool, impure: bool) {
        let name = format!("n{}", self.nodes.len());
        let drv_name = self.drv_name();
        let outputs_text: Vec<String> = outputs.iter().map(|output| format!("\"{output}\"")).collect();
        let system = match self.random.below(12) {
            0 => "i686-linux",
            1 => "builtin",
            _ => "x86_64-linux",
        };
        let head = format!(
            "  {name} = d {{ name = \"{drv_name}\"; outputs = [ {} ]; system = \"{system}\";\n",
            outputs_text.join(" ")
        );
        self.text.extend_from_slice(head.as_bytes());
        self.nodes.push(Node { name, outputs, known, impure });
    }

    fn end(&mut self) {
        self.text.extend_from_slice(b"  };\n");
    }

    fn put(&mut self, text: &str) {
        self.text.extend_from_slice(b"    ");
        self.text.extend_from_slice(text.as_bytes());
        self.text.push(b'\n');
    }

    fn drv_name(&mut self) -> String {
        let number = self.nodes.len();
        match self.random.below(8) {
            0 => format!("{}{number}", self.random.pick(&ODD_NAMES)),
            // The longest that a `.drv` and an output with a name may have.
            1 if self.random.one_in(4) => format!("{number}-{}", "long".repeat(46)),
            _ => format!("drv-{number}"),
        }
    }

    fn outputs(&mut self) -> Vec<&'static str> {
        let count = match self.random.below(8) {
            0..=3 => 1,
            4..=6 => 2 + self.random.below(3),
            _ => 2 + self.random.below(OUTPUTS.len() - 1),
        };
        if count == 1 {
            return vec![if self.random.one_in(4) { self.random.pick(&OUTPUTS) } else { "out" }];
        }
        // Any of them comes first, and that is what the derivation's name alone means.
        let first = self.random.below(OUTPUTS.len());
        (0..count).map(|index| OUTPUTS[(first + index) % OUTPUTS.len()]).collect()
    }

    fn plain(&mut self, below: Below) {
        let outputs = self.outputs();
        self.begin(outputs, below == Below::Known, false);
        self.body(below);
        self.end();
    }

    /// Attributes and arguments of every sort.
    fn body(&mut self, below: Below) {
        if self.random.one_in(3) {
            self.arguments(below);
        }
        for number in 0..self.random.below(5) {
            let value = self.value(below);
            let mut attribute = format!("    v{number} = ").into_bytes();
            attribute.extend_from_slice(&value);
            attribute.extend_from_slice(b";\n");
            self.text.extend_from_slice(&attribute);
        }
        match self.random.below(14) {
            0 => {
                let value = self.reference(below);
                self.put(&format!("exportReferencesGraph = [ \"graph\" {value} ];"));
            }
            1 => self.put("passAsFile = [ \"text\" ]; text = \"as a file\";"),
            // What is named like an output is overwritten by its path.
            2 => self.put("${\"o.1\"} = \"a lie\"; lib = 7; debug = note;"),
            3 => self.put("__ignoreNulls = true; nothing = null; \"odd name \\\" \\n\" = \"odd\"; \"\" = \"of nothing\";"),
            4 => {
                let builder = self.reference(below);
                self.put(&format!("builder = \"${{{builder}}}/bin/builder\";"));
            }
            5 => self.put("builder = \"builtin:fetchurl\"; url = \"http://localhost/x\"; preferLocalBuild = true;"),
            6 => self.put("requiredSystemFeatures = [ \"kvm\" \"big-parallel\" ]; allowSubstitutes = false;"),
            7 => {
                // The `.drv` file itself: alone, or with the whole closure's outputs.
                let node = self.node(below);
                let text = match self.random.one_in(2) {
                    true => format!("deep = {node}.drvPath;"),
                    false => format!("file = builtins.unsafeDiscardOutputDependency {node}.drvPath;"),
                };
                self.put(&text);
            }
            8 => {
                let node = self.node(below);
                self.put(&format!("word = builtins.unsafeDiscardStringContext \"${{{node}}}\";"));
            }
            _ => {}
        }
    }

    fn arguments(&mut self, below: Below) {
        let mut text = b"    args = [ ".to_vec();
        for _ in 0..self.random.below(5) {
            match self.random.one_in(3) {
                true => text.extend_from_slice(self.reference(below).as_bytes()),
                false => text.extend_from_slice(&self.odd_text()),
            }
            text.push(b' ');
        }
        text.extend_from_slice(b"];\n");
        self.text.extend_from_slice(&text);
    }

    fn value(&mut self, below: Below) -> Vec<u8> {
        let reference = self.reference(below);
        let another = self.reference(below);
        match self.random.below(10) {
            0 => reference.into_bytes(),
            1 => format!("[ {reference} \"word\" {another} ]").into_bytes(),
            2 => format!("\"${{{reference}}}/bin:${{{another}}}/bin\"").into_bytes(),
            3 => self
                .random
                .pick(&["tree", "script", "named", "flat", "note", "above-note"])
                .as_bytes()
                .to_vec(),
            4 => {
                format!("[ {reference} [ tree [ ] ] {} true null ]", self.random.below(1 << 20)).into_bytes()
            }
            5 => self.random.pick(&["true", "false", "null", "-17", "0", "[ ]"]).as_bytes().to_vec(),
            _ => self.odd_text(),
        }
    }

    /// A string in double quotes, escaped.
    fn odd_text(&mut self) -> Vec<u8> {
        let mut text = vec![b'"'];
        for byte in self.random.pick(&ODD_TEXT) {
            match byte {
                b'"' | b'\\' | b'$' => text.extend([b'\\', *byte]),
                b'\n' => text.extend_from_slice(b"\\n"),
                // Nix takes a bare one for the end of a line.
                b'\r' => text.extend_from_slice(b"\\r"),
                byte => text.push(*byte),
            }
        }
        text.push(b'"');
        text
    }

    fn node(&mut self, below: Below) -> String {
        // Never itself, which has begun already.
        let last = self.nodes.len() - 1;
        loop {
            let node = &self.nodes[self.random.below(last)];
            if !node.impure && (below == Below::Any || node.known) {
                return node.name.clone();
            }
        }
    }

    /// An output of something before this.
    fn reference(&mut self, below: Below) -> String {
        let name = self.node(below);
        let outputs = self.nodes.iter().find(|node| node.name == name).map(|node| node.outputs.clone());
        match outputs {
            Some(outputs) if !self.random.one_in(3) => {
                format!("{name}.\"{}\"", self.random.pick(&outputs))
            }
            _ => name,
        }
    }

    fn fixed(&mut self) {
        self.begin(vec!["out"], true, false);
        let (algo, bytes) = self.random.pick(&[("md5", 16), ("sha1", 20), ("sha256", 32), ("sha512", 64)]);
        let hash = self.random.hex(bytes);
        let mut fields = match self.random.below(8) {
            0 if self.knows.text => {
                let hash = self.random.hex(32);
                format!("outputHashMode = \"text\"; outputHashAlgo = \"sha256\"; outputHash = \"{hash}\";")
            }
            1 if self.knows.git => {
                let hash = self.random.hex(20);
                format!("outputHashMode = \"git\"; outputHashAlgo = \"sha1\"; outputHash = \"{hash}\";")
            }
            2 => "outputHashMode = \"recursive\"; outputHashAlgo = null;
              outputHash = \"sha256-RBNvo1WzZ4oRRq0W9+hknpT7T8If536DEMBg9hyq/4o=\";"
                .to_owned(),
            3 => "outputHashAlgo = \"sha1\"; outputHash = \"s6mkndx73k3dmfvl7ymdl5hawcbyxhwn\";".to_owned(),
            mode => {
                let mode = if mode % 2 == 0 { "flat" } else { "recursive" };
                format!("outputHashMode = \"{mode}\"; outputHashAlgo = \"{algo}\"; outputHash = \"{hash}\";")
            }
        };
        if self.random.one_in(4) {
            fields.push_str(" impureEnvVars = [ \"http_proxy\" \"https_proxy\" ];");
        }
        self.put(&fields);
        self.body(Below::Any);
        self.end();
    }

    fn floating(&mut self) {
        let outputs = self.outputs();
        let outputs_are_one = outputs.len() == 1;
        self.begin(outputs, false, false);
        let method = match self.random.below(6) {
            0 if outputs_are_one => "flat",
            1 if self.knows.git => "git",
            2 if self.knows.text => "text",
            _ => "recursive",
        };
        let algo = match method {
            "git" => "sha1",
            "text" => "sha256",
            _ => self.random.pick(&["sha256", "sha512", "sha1"]),
        };
        self.put(&format!(
            "__contentAddressed = true; outputHashMode = \"{method}\"; outputHashAlgo = \"{algo}\";"
        ));
        self.body(Below::Any);
        self.end();
    }

    fn impure(&mut self) {
        let outputs = self.outputs();
        self.begin(outputs, false, true);
        self.put("__impure = true;");
        self.body(Below::Any);
        self.end();
    }

    fn structured(&mut self) {
        let outputs = self.outputs();
        let below = if self.random.one_in(4) { Below::Any } else { Below::Known };
        self.begin(outputs, below == Below::Known, false);
        let (one, two) = (self.reference(below), self.reference(below));
        let (number, script) = (self.random.below(1 << 30), self.random.pick(&["tree", "script", "note"]));
        self.put(&format!(
            "__structuredAttrs = true; list = [ {one} [ {two} {{ deep = {script}; }} ] null ];\n    \
             nested = {{ z = {number}; a = -1; t = true; text = \"\u{e9}\\\"\\\\\\n\\t\"; \"odd name\" = {{ }}; float = 1.5; small = 1.0e-7; }};"
        ));
        match self.random.below(4) {
            0 => self.put(&format!("exportReferencesGraph = {{ graph = [ {one} ]; }};")),
            1 => self.put("outputChecks.out.maxSize = 1000000; unsafeDiscardReferences.out = true;"),
            _ => {}
        }
        if self.random.one_in(2) {
            self.arguments(below);
        }
        self.end();
    }

    fn finish(mut self) -> Vec<u8> {
        self.text.extend_from_slice(
            br#"  said = x: { drv = x.drvPath; outputs = builtins.listToAttrs (map (o: { name = o; value = x.${o}.outPath; }) (x.outputs or [ "out" ])); };
in map said [ "#,
        );
        for node in &self.nodes {
            self.text.extend_from_slice(node.name.as_bytes());
            self.text.push(b'\n');
        }
        self.text.extend_from_slice(b"]\n");
        self.text
    }
}
