//! The last lines of a log, for messages.

use std::collections::VecDeque;

/// How many last lines a failure's message has (Nix: `log-lines`).
const TAIL_LINES: usize = 25;
/// Longest line that the tail keeps whole.
const MAX_TAIL_LINE: usize = 2000;

/// The last lines of a log, as a terminal would leave them: a carriage return starts its line over. Lines that are
/// messages to Nix (`@nix {…}`) are left out.
#[derive(Default)]
pub(crate) struct Tail {
    lines: VecDeque<Vec<u8>>,
    current: Vec<u8>,
    return_pending: bool,
}

impl Tail {
    pub(crate) fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if *byte == b'\n' {
                self.return_pending = false;
                self.end_line();
                continue;
            }
            if std::mem::take(&mut self.return_pending) {
                self.current.clear();
            }
            match byte {
                b'\r' => self.return_pending = true,
                _ if self.current.len() < MAX_TAIL_LINE => self.current.push(*byte),
                _ => {}
            }
        }
    }

    pub(crate) fn finish(mut self) -> Vec<String> {
        if !self.current.is_empty() {
            self.end_line();
        }
        self.lines.iter().map(|line| String::from_utf8_lossy(line).into_owned()).collect()
    }

    fn end_line(&mut self) {
        let line = std::mem::take(&mut self.current);
        if line.starts_with(b"@nix {") {
            return;
        }
        if self.lines.len() == TAIL_LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_what_a_terminal_shows() {
        let mut tail = Tail::default();
        tail.write(b"a\r\nprogress 1\rprogress 2\n@nix {\"action\":\"msg\"}\nend");
        assert_eq!(tail.finish(), ["a", "progress 2", "end"]);
        let mut tail = Tail::default();
        (0..100).for_each(|i| tail.write(format!("{i}\n").as_bytes()));
        let lines = tail.finish();
        assert_eq!((lines.len(), lines[0].as_str(), lines[24].as_str()), (25, "75", "99"));
    }
}
