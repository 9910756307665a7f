//! Prints the table of spans, as `docs/tracing.md` has it. `cargo xtask docs` runs this.

fn main() {
    print!("{}", drover_operator::trace::markdown());
}
