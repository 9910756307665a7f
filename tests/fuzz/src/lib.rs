//! Fuzz targets: everything that parses what a peer sends, each as a plain function of bytes.
//!
//! A target must hold for every input: no panic, no arithmetic overflow, memory bounded by the input's size, and the
//! property that its module names. Two drivers run them: libFuzzer (`cargo xtask fuzz`, the program in `bin/`), and this
//! crate's own tests, which replay the seeds and every input that once broke something (`cases/TARGET/*.hex`). Nothing
//! here touches the network, and of the file system only an unnamed temporary file per imported archive.

mod memory;
mod seeds;
mod session;
mod targets;

#[cfg(test)]
mod tests;

pub use memory::Counting;
pub use seeds::{from_hex, to_hex};
pub use targets::{TARGETS, Target};

impl Target {
    /// The target of this name.
    pub fn find(name: &str) -> Option<&'static Self> {
        TARGETS.iter().find(|target| target.name == name)
    }

    /// Runs the target; panics where it does not hold. Memory is judged only under [`Counting`].
    pub fn run(&self, data: &[u8]) {
        let peak = memory::peak(|| (self.check)(data));
        let allowed = self.fixed_memory + self.memory_per_byte * data.len();
        assert!(peak <= allowed, "{} bytes of input took {peak} bytes of memory, not {allowed}", data.len());
    }
}
