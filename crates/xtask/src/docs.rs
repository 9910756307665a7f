//! Pages of `docs/` that are made from the code: what is written by hand stands above a mark, the table below it.
//!
//! Whoever has another one adds a line to [`PAGES`], and a page with the mark as its last line.

mod limits;

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{development, run};

/// A page, from the checkout, and what makes the part of it that is not written by hand.
type Page = (&'static str, fn() -> Result<String>);

const PAGES: &[Page] = &[
    ("docs/reasons.md", || example("reasons")),
    ("docs/events.md", || example("events")),
    ("docs/metrics.md", || example("metrics")),
    ("docs/tracing.md", || example("spans")),
    ("docs/limits.md", || limits::table(&crate::checkout())),
    ("docs/permissions.md", || crate::permissions::table(&crate::checkout())),
];
/// Where the written part of a page ends.
const MARK: &str = "<!-- What follows is written by `cargo xtask docs`. -->\n";

/// Writes what the code says into the pages.
pub fn write() -> Result<()> {
    for page in PAGES {
        let (path, _, wanted) = read(page)?;
        fs::write(&path, wanted)?;
        println!("{}", page.0);
    }
    Ok(())
}

/// Fails where a page is not what the code says.
pub fn check() -> Result<()> {
    let mut wrong = Vec::new();
    for page in PAGES {
        let (_, found, wanted) = read(page)?;
        if found != wanted {
            wrong.push(page.0);
        }
    }
    if !wrong.is_empty() {
        bail!("not what the code says: {}; run: cargo xtask docs", wrong.join(", "));
    }
    println!("{} pages are what the code says", PAGES.len());
    Ok(())
}

/// What an example prints: a table of what only its package knows.
fn example(name: &str) -> Result<String> {
    run::stdout(&mut Command::new(development::compile()?.join("examples").join(name)))
}

/// The page's path, what it has and what it should have.
fn read((name, made): &Page) -> Result<(PathBuf, String, String)> {
    let path = crate::checkout().join(name);
    let page = fs::read_to_string(&path).with_context(|| format!("could not read {}", path.display()))?;
    let wanted = splice(&page, &made()?).with_context(|| format!("in {name}"))?;
    Ok((path, page, wanted))
}

fn splice(page: &str, table: &str) -> Result<String> {
    let (written, _) = page.split_once(MARK).with_context(|| format!("there is no line {MARK:?}"))?;
    Ok(format!("{written}{MARK}\n{table}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_above_the_mark_stays() {
        let page = format!("# A\n{MARK}\nold\n");
        let new = splice(&page, "| new |\n").unwrap();
        assert_eq!(new, format!("# A\n{MARK}\n| new |\n"));
        assert_eq!(splice(&new, "| new |\n").unwrap(), new);
        assert!(splice("# A\n", "").is_err());
    }
}
