//! A session's events as lines for people.

use std::time::{Duration, Instant};

use drover_session::{Event, Observer};

use super::console::Console;

/// Between two versions of the terminal's last line.
const REFRESH: Duration = Duration::from_millis(100);

pub(super) struct Progress {
    name: String,
    console: Console,
    missing: usize,
    missing_bytes: u64,
    copied: usize,
    copied_bytes: u64,
    refreshed: Option<Instant>,
}

impl Progress {
    pub(super) fn new(name: &str, console: Console) -> Self {
        Self {
            name: name.to_owned(),
            console,
            missing: 0,
            missing_bytes: 0,
            copied: 0,
            copied_bytes: 0,
            refreshed: None,
        }
    }

    /// Takes the last line away.
    pub(super) fn end(&self) {
        self.console.status("");
    }

    fn say(&mut self, text: &str) {
        let line = format!("{}: {text}", self.name);
        if self.console.is_terminal() {
            self.console.status(&line);
        } else {
            self.console.line(&line);
        }
        self.refreshed = Some(Instant::now());
    }

    /// What changes too often to be a line of its own.
    fn refresh(&mut self, text: &str) {
        if self.console.is_terminal() && self.refreshed.is_none_or(|last| last.elapsed() >= REFRESH) {
            self.say(text);
        }
    }

    fn copying(&self, more: u64) -> String {
        let (done, all) = (bytes(self.copied_bytes + more), bytes(self.missing_bytes));
        format!("copying inputs, {}/{} paths, {done}/{all}", self.copied, self.missing)
    }
}

impl Observer for Progress {
    fn event(&mut self, event: Event) {
        match event {
            Event::Locked { valid, missing, missing_bytes } => {
                (self.missing, self.missing_bytes) = (missing, missing_bytes);
                let size = bytes(missing_bytes);
                self.say(&format!("{} inputs, {valid} there, {missing} to copy ({size})", valid + missing));
            }
            Event::FetchStarted { paths, bytes: size } => {
                self.refresh(&format!("the builder fetches {paths} inputs ({})", bytes(size)));
            }
            Event::Fetched { paths, bytes: size } if paths > 0 => {
                self.missing -= paths.min(self.missing);
                self.missing_bytes = self.missing_bytes.saturating_sub(size);
                self.say(&format!("the builder has fetched {paths} inputs ({})", bytes(size)));
            }
            Event::CopyProgress { bytes, .. } => self.refresh(&self.copying(bytes)),
            Event::Copied { nar_size, .. } => {
                self.copied += 1;
                self.copied_bytes += nar_size;
                self.refresh(&self.copying(0));
            }
            Event::CacheSetAside { cache, path, why } => {
                self.console
                    .line(&format!("{}: {cache} gives {path} wrong, and is set aside: {why}", self.name));
            }
            Event::BuildStarted => self.say("building"),
            Event::OutputStarted { name, nar_size, .. } => {
                self.say(&format!("receiving output {name} ({})", bytes(nar_size)));
            }
            Event::OutputProgress { name, bytes: done } => {
                self.refresh(&format!("receiving output {name}, {}", bytes(done)));
            }
            Event::OutputStored { path, cache, .. } => self.say(&format!("stored {path} in {cache}")),
            _ => {}
        }
    }
}

/// As people read sizes: three digits and a unit of 1024.
fn bytes(count: u64) -> String {
    let mut value = count as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1000.0 {
            let digits = usize::from(unit != "B" && value < 100.0);
            return format!("{value:.digits$} {unit}");
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (count, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 KiB"),
            (1 << 20, "1.0 MiB"),
            (150 << 20, "150 MiB"),
            (5 << 30, "5.0 GiB"),
            (5 << 40, "5.0 TiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
    }
}
