//! Prints the table of metrics, as `docs/metrics.md` has it. `cargo xtask docs` runs this.

fn main() {
    print!("{}", drover_operator::metrics::table::markdown());
}
