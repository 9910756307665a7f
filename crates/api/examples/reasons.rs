//! Prints the table of reasons, as `docs/reasons.md` has it. `cargo xtask docs` runs this.

fn main() {
    print!("{}", drover_api::reasons_markdown());
}
