//! Pages of `docs/` that are made from the code: what is written by hand stands above a mark, the table below it.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::run;

/// The page, from the checkout.
const REASONS: &str = "docs/reasons.md";
/// Where the written part of a page ends.
const MARK: &str = "<!-- What follows is written by `cargo xtask docs`. -->\n";

/// Writes what the code says into the pages.
pub fn write() -> Result<()> {
    let (path, _, wanted) = pages()?;
    fs::write(&path, wanted)?;
    println!("{REASONS}");
    Ok(())
}

/// Fails where a page is not what the code says.
pub fn check() -> Result<()> {
    let (_, page, wanted) = pages()?;
    if page != wanted {
        bail!("{REASONS} is not what the code says; run: cargo xtask docs");
    }
    println!("{REASONS} is what the code says");
    Ok(())
}

/// The page's path, what it has and what it should have.
fn pages() -> Result<(PathBuf, String, String)> {
    let path = crate::checkout().join(REASONS);
    let page = fs::read_to_string(&path).with_context(|| format!("could not read {}", path.display()))?;
    let mut print = run::cargo();
    print.args(["run", "--quiet", "--package", "drover-api", "--example", "reasons"]);
    let wanted = splice(&page, &run::stdout(&mut print)?)?;
    Ok((path, page, wanted))
}

fn splice(page: &str, table: &str) -> Result<String> {
    let (written, _) = page.split_once(MARK).with_context(|| format!("{REASONS} has no line {MARK:?}"))?;
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
