//! Pages of documentation as tests read them: what can be applied, what can be run, where links lead.
//!
//! Every block of a page is fenced, and the words behind its fence say what a test does with it:
//!
//! | words | the block is |
//! |---|---|
//! | `yaml` | objects, that a real API server takes (a dry run) |
//! | `yaml values` | values, that Helm renders the chart with |
//! | `sh` | commands, run in order, page by page, by a shell that stops at the first that fails |
//! | `sh node` | the same, in a cluster with a node, where pods run |
//! | `text` | what programs print, or what a test cannot do |
//!
//! What a page needs and its reader does not stands in a comment: `<!-- sh`, the commands, `-->`. Every other word is an error,
//! and so is a fence that is not closed: nothing escapes by a slip of the pen. This module reads; [`shell`] runs.

pub mod shell;

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::{fs, io};

use anyhow::{Context, Result, bail};

/// What a test does with a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Objects for the API server.
    Objects,
    /// Values for the chart.
    Values,
    /// Commands for a cluster without nodes.
    Shell,
    /// Commands for a cluster with a node.
    Node,
    /// Nothing.
    Text,
}

/// A fenced block, or a comment with commands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    pub kind: Kind,
    /// Of its fence, from 1.
    pub line: usize,
    pub text: String,
}

/// A page.
#[derive(Clone, Debug, Default)]
pub struct Page {
    /// From the checkout.
    pub path: PathBuf,
    pub blocks: Vec<Block>,
    /// Line and target of every link that stands in its text.
    pub links: Vec<(usize, String)>,
    /// What can stand behind `#` in a link to it.
    pub anchors: BTreeSet<String>,
    /// Line and text of every heading, `#` included.
    pub headings: Vec<(usize, String)>,
    /// Lines that begin a block which is indented and has no fence.
    pub indented: Vec<usize>,
}

impl Page {
    pub fn read(checkout: &Path, path: &Path) -> Result<Self> {
        let text = fs::read_to_string(checkout.join(path))
            .with_context(|| format!("could not read {}", path.display()))?;
        Self::parse(path, &text)
    }

    pub fn parse(path: &Path, text: &str) -> Result<Self> {
        let mut page = Self { path: path.to_owned(), ..Self::default() };
        let mut seen: HashMap<String, usize> = HashMap::new();
        let mut lines = text.lines().enumerate().map(|(index, line)| (index + 1, line)).peekable();
        let (mut after_blank, mut in_list) = (true, false);
        while let Some((number, line)) = lines.next() {
            let trimmed = line.trim_start();
            let indent = line.len() - trimmed.len();
            let at = || format!("{}:{number}", path.display());
            if let Some(words) = trimmed.strip_prefix("```") {
                let kind = kind(words.trim()).with_context(at)?;
                let text = until(&mut lines, indent, "```").with_context(at)?;
                page.blocks.push(Block { kind, line: number, text });
            } else if let Some(words) = trimmed.strip_prefix("<!-- sh").filter(|rest| !rest.contains("-->")) {
                let kind = kind(&format!("sh{words}")).with_context(at)?;
                let text = until(&mut lines, indent, "-->").with_context(at)?;
                page.blocks.push(Block { kind, line: number, text });
            } else {
                if after_blank && indent >= 4 && !in_list && !trimmed.is_empty() {
                    page.indented.push(number);
                }
                if indent == 0 && !trimmed.is_empty() {
                    in_list = is_item(trimmed) || (in_list && !after_blank);
                }
                if let Some(heading) = heading(line) {
                    page.headings.push((number, line.to_owned()));
                    let slug = slug(heading);
                    let times = seen.entry(slug.clone()).or_default();
                    page.anchors.insert(if *times == 0 { slug } else { format!("{slug}-{times}") });
                    *times += 1;
                }
                page.links.extend(links(line).into_iter().map(|target| (number, target)));
            }
            after_blank = trimmed.is_empty();
        }
        Ok(page)
    }

    /// The blocks of a kind, in order.
    pub fn of(&self, kind: Kind) -> impl Iterator<Item = &Block> {
        self.blocks.iter().filter(move |block| block.kind == kind)
    }

    /// All commands of a kind as one script, which says on standard error where it is. None if the page has none.
    pub fn script(&self, kind: Kind) -> Option<String> {
        let mut script = String::from("set -euo pipefail\n");
        for block in self.of(kind) {
            script += &format!("echo '== {}:{}' >&2\n{}\n", self.path.display(), block.line, block.text);
        }
        self.of(kind).next().map(|_| script)
    }
}

/// Every page of the checkout, by its path, in order.
pub fn all(checkout: &Path) -> Result<Vec<Page>> {
    let mut paths = Vec::new();
    find(checkout, Path::new(""), &mut paths)?;
    paths.sort();
    paths.iter().map(|path| Page::read(checkout, path)).collect()
}

/// The pages for people who use Drover: the README and what is in `docs/`.
pub fn of_users(checkout: &Path) -> Result<Vec<Page>> {
    let pages = all(checkout)?;
    Ok(pages.into_iter().filter(|page| is_for_users(&page.path)).collect())
}

fn is_for_users(path: &Path) -> bool {
    path == Path::new("README.md") || path.starts_with("docs")
}

fn find(checkout: &Path, below: &Path, found: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(checkout.join(below))? {
        let entry = entry?;
        let name = entry.file_name();
        let is_own = name.as_encoded_bytes().starts_with(b".") || name == "target";
        let path = below.join(&name);
        if entry.file_type()?.is_dir() && !is_own {
            find(checkout, &path, found)?;
        } else if path.extension().is_some_and(|extension| extension == "md") {
            found.push(path);
        }
    }
    Ok(())
}

fn kind(words: &str) -> Result<Kind> {
    Ok(match words {
        "yaml" => Kind::Objects,
        "yaml values" => Kind::Values,
        "sh" => Kind::Shell,
        "sh node" => Kind::Node,
        "text" => Kind::Text,
        "" => bail!("a fence says nothing; it has to say yaml, yaml values, sh, sh node or text"),
        _ => bail!("a fence says {words:?}; known are yaml, yaml values, sh, sh node and text"),
    })
}

/// The lines up to the one that is `end`, without the indent that the first one has.
fn until<'a>(lines: &mut impl Iterator<Item = (usize, &'a str)>, indent: usize, end: &str) -> Result<String> {
    let mut text = String::new();
    for (_, line) in lines {
        if line.trim() == end {
            return Ok(text);
        }
        let own = line.len() - line.trim_start().len();
        text.push_str(&line[own.min(indent)..]);
        text.push('\n');
    }
    bail!("what begins here is not closed by {end}")
}

/// Whether an item of a list begins.
fn is_item(line: &str) -> bool {
    let digits = line.trim_start_matches(|c: char| c.is_ascii_digit());
    line.starts_with("- ")
        || line.starts_with("* ")
        || (digits.len() < line.len() && digits.starts_with(". "))
}

fn heading(line: &str) -> Option<&str> {
    let text = line.trim_start_matches('#');
    let level = line.len() - text.len();
    ((1..=6).contains(&level) && text.starts_with(' ')).then(|| text.trim())
}

/// How GitHub calls a heading in a link.
fn slug(heading: &str) -> String {
    // A link in a heading counts with its text alone.
    let mut text = String::new();
    let mut rest = heading;
    while let Some((before, link)) = rest.split_once("](") {
        text.push_str(before);
        rest = link.split_once(')').map_or("", |(_, after)| after);
    }
    text.push_str(rest);
    let kept = text.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.flat_map(char::to_lowercase).map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// Targets of the links in a line, `[text](target)`, but for those in code.
fn links(line: &str) -> Vec<String> {
    // Every other part is between backticks.
    let text: String = line.split('`').step_by(2).collect::<Vec<_>>().join("code");
    let ends = text.split("](").skip(1);
    ends.filter_map(|rest| rest.split_once(')')).map(|(target, _)| target.trim().to_owned()).collect()
}

#[cfg(test)]
mod tests;
