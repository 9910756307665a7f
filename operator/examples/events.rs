//! Prints the table of events, as `docs/events.md` has it. `cargo xtask docs` runs this.

fn main() {
    print!("{}", drover_operator::events::markdown());
}
