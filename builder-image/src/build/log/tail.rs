//! The last lines of a log, for messages.

use std::collections::VecDeque;

use bstr::ByteSlice as _;

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
    pub(crate) fn write(&mut self, mut bytes: &[u8]) {
        while let Some(at) = bytes.find_byteset(b"\n\r") {
            let (text, rest) = bytes.split_at(at);
            self.text(text);
            if rest.first() == Some(&b'\n') {
                self.return_pending = false;
                self.end_line();
            } else {
                self.start_over();
                self.return_pending = true;
            }
            bytes = rest.get(1..).unwrap_or_default();
        }
        self.text(bytes);
    }

    fn text(&mut self, text: &[u8]) {
        if !text.is_empty() {
            self.start_over();
            let room = MAX_TAIL_LINE - self.current.len();
            self.current.extend(text.iter().take(room));
        }
    }

    /// What comes behind a carriage return that no line feed followed.
    fn start_over(&mut self) {
        if std::mem::take(&mut self.return_pending) {
            self.current.clear();
        }
    }

    pub(crate) fn finish(mut self) -> Vec<String> {
        if !self.current.is_empty() {
            self.end_line();
        }
        self.lines.iter().map(|line| harmless(&String::from_utf8_lossy(line))).collect()
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

/// Messages go to terminals and into fields of resources: what would do something there is shown instead.
fn harmless(line: &str) -> String {
    let shown = |c: char| if c.is_control() && c != '\t' { c.escape_default().to_string() } else { c.into() };
    line.chars().map(shown).collect()
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
        for piece in ["lost\r", "\r", "kept", "\r", "\n", "\n", "x\r\ry", &"z".repeat(3 * MAX_TAIL_LINE)] {
            tail.write(piece.as_bytes());
        }
        let last = format!("y{}", "z".repeat(MAX_TAIL_LINE - 1));
        assert_eq!(tail.finish(), ["kept", "", &last]);
        let mut tail = Tail::default();
        (0..100).for_each(|i| tail.write(format!("{i}\n").as_bytes()));
        let lines = tail.finish();
        assert_eq!((lines.len(), lines[0].as_str(), lines[24].as_str()), (25, "75", "99"));
    }
}
