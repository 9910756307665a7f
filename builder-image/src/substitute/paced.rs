//! A stream that ends with an error if it creeps, or if nobody wants it any more.

use std::io::{self, ErrorKind, Read};
use std::time::{Duration, Instant};

use drover_serve::SLOWEST_FETCH;

use crate::build::cancel::Cancel;

/// Over so much waiting the pace is measured. Time that whoever reads takes for itself does not count.
const WINDOW: Duration = Duration::from_secs(30);

pub(super) struct Paced<'a, R> {
    inner: R,
    cancel: &'a Cancel,
    window: Duration,
    waited: Duration,
    bytes: u64,
}

impl<'a, R: Read> Paced<'a, R> {
    pub(super) fn new(inner: R, cancel: &'a Cancel) -> Self {
        Self { inner, cancel, window: WINDOW, waited: Duration::ZERO, bytes: 0 }
    }
}

impl<R: Read> Read for Paced<'_, R> {
    /// Its own errors have the kind `TimedOut`.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.cancel.is_cancelled() {
            return Err(io::Error::new(ErrorKind::TimedOut, "nobody waits for it any more"));
        }
        let begun = Instant::now();
        let count = self.inner.read(buffer)?;
        self.waited += begun.elapsed();
        self.bytes += count as u64;
        if count > 0 && self.waited >= self.window {
            if self.bytes < SLOWEST_FETCH.saturating_mul(self.window.as_secs()) {
                let why = format!("only {} bytes came in {} s", self.bytes, self.waited.as_secs());
                return Err(io::Error::new(ErrorKind::TimedOut, why));
            }
            (self.waited, self.bytes) = (Duration::ZERO, 0);
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A byte now and then.
    struct Trickle;

    impl Read for Trickle {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            std::thread::sleep(Duration::from_millis(2));
            buffer[0] = 0;
            Ok(1)
        }
    }

    #[test]
    fn what_creeps_is_given_up_and_what_flows_is_not() {
        let cancel = Cancel::new().unwrap();
        let paced = |inner| Paced { window: Duration::from_secs(1), ..Paced::new(inner, &cancel) };
        let creeping: Box<dyn Read> = Box::new(Trickle);
        let error = paced(creeping).read_to_end(&mut Vec::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        let flowing: Box<dyn Read> = Box::new(io::repeat(0).take(100 << 20));
        let mut paced = Paced { window: Duration::ZERO, ..Paced::new(flowing, &cancel) };
        assert_eq!(io::copy(&mut paced, &mut io::sink()).unwrap(), 100 << 20);
        cancel.cancel();
        assert!(Paced::new(&b"x"[..], &cancel).read(&mut [0]).is_err());
    }
}
