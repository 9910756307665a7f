//! How pages are read, and what holds for every page of this checkout without anything being run.

use super::*;

fn page(text: &str) -> Result<Page> {
    Page::parse(Path::new("p.md"), text)
}

#[test]
fn blocks_are_what_their_fences_say() {
    let text = "# A\n\n```yaml\na: 1\n```\n- item\n\n  ```sh\n  echo a\n    echo b\n  ```\n<!-- sh node\necho c\n-->\n```text\n$ no\n```\n";
    let page = page(text).unwrap();
    let seen: Vec<_> = page.blocks.iter().map(|b| (b.kind, b.line, b.text.as_str())).collect();
    assert_eq!(
        seen,
        [
            (Kind::Objects, 3, "a: 1\n"),
            (Kind::Shell, 8, "echo a\n  echo b\n"),
            (Kind::Node, 12, "echo c\n"),
            (Kind::Text, 15, "$ no\n"),
        ]
    );
    let script = page.script(Kind::Shell).unwrap();
    assert_eq!(script, "set -euo pipefail\necho '== p.md:8' >&2\necho a\n  echo b\n\n");
    assert_eq!(page.script(Kind::Values), None);
}

#[test]
fn nothing_escapes() {
    for (text, why) in [
        ("```sh\necho\n", "is not closed by ```"),
        ("<!-- sh\necho\n", "is not closed by -->"),
        ("```\necho\n```\n", "says nothing"),
        ("```bash\necho\n```\n", "\"bash\""),
        ("```sh nodes\necho\n```\n", "\"sh nodes\""),
        ("```yaml value\na: 1\n```\n", "\"yaml value\""),
        ("<!-- shell\necho\n-->\n", "\"shell\""),
    ] {
        let error = format!("{:#}", page(text).unwrap_err());
        assert!(error.starts_with("p.md:1: ") && error.contains(why), "{text:?}: {error}");
    }
    assert_eq!(page("a\n\n    echo\n    echo\n").unwrap().indented, [3]);
    assert_eq!(page("- a\n\n    more of a\n\nb\n\n    echo\n").unwrap().indented, [7]);
    assert_eq!(page("<!-- a remark -->\n<!-- sh is a shell -->\n").unwrap().blocks, []);
}

#[test]
fn links_and_anchors_are_github_s() {
    let text = "# The `drover` program, v1\n## A\n## A\nSee [a](b.md#c), `[no](x)` and [d](#a-1).\n```text\n[no](y)\n# no\n```\n";
    let page = page(text).unwrap();
    assert_eq!(page.links, [(4, "b.md#c".to_owned()), (4, "#a-1".to_owned())]);
    assert_eq!(page.anchors, ["the-drover-program-v1", "a", "a-1"].map(str::to_owned).into());
    assert_eq!(slug("[One](two.md) & three"), "one--three");
}

#[test]
fn every_link_leads_somewhere() {
    let checkout = xtask::checkout();
    let pages = all(&checkout).unwrap();
    let anchors: HashMap<_, _> = pages.iter().map(|page| (page.path.clone(), &page.anchors)).collect();
    let mut broken = Vec::new();
    for page in &pages {
        for (line, link) in page.links.iter().filter(|(_, link)| !link.contains("://")) {
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let path = if file.is_empty() { page.path.clone() } else { beside(&page.path, file) };
            let is_there = checkout.join(&path).exists();
            let has_anchor = anchor.is_empty() || anchors.get(&path).is_some_and(|all| all.contains(anchor));
            if !is_there || !has_anchor {
                broken.push(format!("{}:{line}: {link}", page.path.display()));
            }
        }
    }
    assert!(broken.is_empty(), "links that lead nowhere:\n{}", broken.join("\n"));
    assert!(pages.iter().map(|page| page.links.len()).sum::<usize>() > 50, "links were not found");
}

/// `from` is a page, `link` a path from there.
fn beside(from: &Path, link: &str) -> PathBuf {
    let mut path = from.parent().unwrap_or_else(|| Path::new("")).to_owned();
    for part in Path::new(link).components() {
        match part {
            std::path::Component::ParentDir => drop(path.pop()),
            part => path.push(part),
        }
    }
    path
}

#[test]
fn pages_for_users_have_fences_around_everything() {
    for page in of_users(&xtask::checkout()).unwrap() {
        assert!(page.indented.is_empty(), "{}: lines {:?}", page.path.display(), page.indented);
    }
}

/// Troubleshooting goes by messages: each has to be one that the programs really print. `…` stands for what differs.
#[test]
fn messages_of_troubleshooting_are_in_the_sources() {
    let checkout = xtask::checkout();
    let page = Page::read(&checkout, Path::new("docs/troubleshooting.md")).unwrap();
    let mut sources = String::new();
    for dir in ["crates", "operator", "builder-image", "charts/drover"] {
        read_sources(&checkout.join(dir), &mut sources);
    }
    let mut found = 0;
    let mut unsaid = Vec::new();
    for (line, heading) in page.headings.iter().filter(|(_, heading)| heading.starts_with("### ")) {
        let quoted: Vec<&str> = heading.split('`').skip(1).step_by(2).collect();
        assert!(!quoted.is_empty(), "line {line}: a heading without a message between backticks");
        for part in quoted.iter().flat_map(|message| message.split('…')).map(str::trim) {
            found += 1;
            if !part.is_empty() && !sources.contains(part) {
                unsaid.push(format!("line {line}: {part:?}"));
            }
        }
    }
    assert!(unsaid.is_empty(), "nothing says:\n{}", unsaid.join("\n"));
    assert!(found > 30, "messages were not found");
}

/// Sources in one line each where a string goes on behind a backslash.
fn read_sources(dir: &Path, into: &mut String) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            read_sources(&path, into);
        } else if path.extension().is_some_and(|e| e == "rs" || e == "tpl" || e == "json") {
            let text = fs::read_to_string(&path).unwrap();
            let mut lines = text.lines();
            while let Some(line) = lines.next() {
                let mut line = line.to_owned();
                while line.ends_with('\\') {
                    line.pop();
                    line.push_str(lines.next().unwrap_or_default().trim_start());
                }
                into.push_str(&line.replace("\\\"", "\""));
                into.push('\n');
            }
        }
    }
}
