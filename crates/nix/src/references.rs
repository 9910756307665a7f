//! Finding references: which of a set of store paths occur in a stream, by their hash parts (Nix: references.cc).
//!
//! Only the 32 digits count, not the store's directory nor the name, and the stream is the NAR, so that file names and
//! symlink targets are seen too.

use std::collections::{BTreeSet, HashMap};

use crate::store_path::HASH_PART_LEN;
use crate::{StorePath, base32};

type Digits = [u8; HASH_PART_LEN];

/// Feed it a NAR's bytes, in pieces of any size.
pub struct RefScanner {
    /// What was not found yet. Two candidates may share their digits.
    wanted: HashMap<Digits, Vec<StorePath>>,
    filter: Filter,
    found: BTreeSet<StorePath>,
    /// The last bytes of the stream, fewer than a hash part has, and as many again of the next piece.
    seam: [u8; 2 * SEAM],
    seam_len: usize,
}

/// Bytes at a piece's end that may begin a hash part that the next piece completes.
const SEAM: usize = HASH_PART_LEN - 1;

impl RefScanner {
    /// Looks for the hash parts of `candidates`.
    pub fn new(candidates: impl IntoIterator<Item = StorePath>) -> Self {
        let mut wanted = HashMap::<_, Vec<_>>::new();
        let mut filter = Filter::new();
        for path in candidates {
            let digits = digits(&path);
            filter.insert(&digits);
            wanted.entry(digits).or_default().push(path);
        }
        for paths in wanted.values_mut() {
            paths.sort();
            paths.dedup();
        }
        Self { wanted, filter, found: BTreeSet::new(), seam: [0; 2 * SEAM], seam_len: 0 }
    }

    pub fn feed(&mut self, bytes: &[u8]) {
        if self.wanted.is_empty() {
            return;
        }
        // Across the seam: the old bytes and as many new ones as a match that begins in the old ones can reach.
        let head = bytes.len().min(SEAM);
        let end = self.seam_len + head;
        self.seam[self.seam_len..end].copy_from_slice(&bytes[..head]);
        let seam = self.seam;
        self.scan(&seam[..end]);
        if bytes.len() > SEAM {
            self.scan(bytes);
            self.seam[..SEAM].copy_from_slice(&bytes[bytes.len() - SEAM..]);
            self.seam_len = SEAM;
        } else {
            let keep = end.min(SEAM);
            self.seam.copy_within(end - keep..end, 0);
            self.seam_len = keep;
        }
    }

    /// The candidates that occurred.
    pub fn found(self) -> BTreeSet<StorePath> {
        self.found
    }

    fn scan(&mut self, bytes: &[u8]) {
        let mut start = 0;
        // Digits before this position were seen to be digits already.
        let mut checked = 0;
        while let Some(window) = bytes.get(start..start + HASH_PART_LEN) {
            // From the right: the rightmost byte that is no digit moves the window behind it.
            let from = checked.max(start) - start;
            checked = start + HASH_PART_LEN;
            if let Some(at) = window[from..].iter().rposition(|byte| !base32::is_digit(*byte)) {
                start += from + at + 1;
                continue;
            }
            let mut digits = [0; HASH_PART_LEN];
            digits.copy_from_slice(window);
            if self.filter.may_contain(&digits)
                && let Some(paths) = self.wanted.remove(&digits)
            {
                self.found.extend(paths);
                if self.wanted.is_empty() {
                    return;
                }
            }
            start += 1;
        }
    }
}

/// Feeding is writing, so that a scanner can stand behind a tee.
impl std::io::Write for RefScanner {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.feed(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn digits(path: &StorePath) -> Digits {
    let mut digits = [0; HASH_PART_LEN];
    digits.copy_from_slice(path.hash_part().as_bytes());
    digits
}

/// A set that says "perhaps" or "no" about the first half of a hash part. Runs of digits are looked up at each of
/// their bytes; this spares nearly all of them the map, whose hasher is slow because it resists chosen keys.
struct Filter(Box<[u64; 1024]>);

impl Filter {
    fn new() -> Self {
        Self(Box::new([0; 1024]))
    }

    fn insert(&mut self, digits: &Digits) {
        let (word, bit) = Self::place(digits);
        self.0[word] |= bit;
    }

    fn may_contain(&self, digits: &Digits) -> bool {
        let (word, bit) = Self::place(digits);
        self.0[word] & bit != 0
    }

    fn place(digits: &Digits) -> (usize, u64) {
        let mut first = [0; 8];
        first.copy_from_slice(&digits[..8]);
        let hash = u64::from_le_bytes(first).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48;
        ((hash >> 6) as usize, 1 << (hash & 63))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn path(seed: u8, name: &str) -> StorePath {
        StorePath::from_parts(std::array::from_fn(|i| seed.wrapping_mul(i as u8 + 3) ^ seed), name).unwrap()
    }

    fn scan<'a>(candidates: &[StorePath], pieces: impl IntoIterator<Item = &'a [u8]>) -> BTreeSet<StorePath> {
        let mut scanner = RefScanner::new(candidates.iter().cloned());
        for piece in pieces {
            scanner.feed(piece);
        }
        scanner.found()
    }

    #[test]
    fn digits_alone_are_a_reference() {
        let (a, b, twin) = (path(1, "a"), path(2, "b"), path(1, "twin"));
        let candidates = [a.clone(), b.clone(), twin.clone()];
        let text = format!("x{}", a.hash_part());
        assert_eq!(scan(&candidates, [text.as_bytes()]), [a.clone(), twin].into());
        // Digits in front of it, and one digit short.
        let text = format!("zz0{}{}", a.hash_part(), b.hash_part());
        assert_eq!(scan(&candidates, [text.as_bytes()]).len(), 3);
        assert_eq!(scan(&candidates, [&a.hash_part().as_bytes()[1..]]), BTreeSet::new());
        assert_eq!(scan(&candidates, [a.hash_part().to_uppercase().as_bytes()]), BTreeSet::new());
        assert_eq!(scan(&[], [text.as_bytes()]), BTreeSet::new());
    }

    #[test]
    fn every_split_in_two() {
        let wanted = path(7, "x");
        let text = format!("0123{}-x", wanted.hash_part());
        for at in 0..text.len() {
            let (left, right) = text.as_bytes().split_at(at);
            assert_eq!(scan(std::slice::from_ref(&wanted), [left, right]).len(), 1, "{at}");
        }
    }

    proptest! {
        /// Against the obvious search, with the stream cut anywhere.
        #[test]
        fn finds_what_is_there(
            parts in prop::collection::vec((0u8..8, "[0-9a-z/]{0,40}", 1usize..32), 0..12),
            piece in 1usize..90,
        ) {
            let candidates: Vec<StorePath> = (0..6).map(|seed| path(seed, "n")).collect();
            let mut text = String::new();
            for (seed, noise, cut) in parts {
                text += &noise;
                if seed < 4 {
                    text += path(seed, "n").hash_part();
                }
                text += &path(5, "n").hash_part()[..cut]; // never whole by itself
            }
            let expected: BTreeSet<_> =
                candidates.iter().filter(|path| text.contains(path.hash_part())).cloned().collect();
            prop_assert_eq!(scan(&candidates, text.as_bytes().chunks(piece)), expected);
        }
    }
}
