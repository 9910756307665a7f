//! A network that is far away: a proxy on loopback that hands on every byte after half a round-trip time, in both
//! directions, at whatever rate it comes. Kernels that are built without netem cannot do it by themselves.
//!
//! It takes what arrives at once, so that only the protocol's own windows limit what is on its way; it shows nothing of
//! how TCP itself behaves over distance.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::Result;

/// Bytes that are taken at a time.
const PIECE: usize = 256 << 10;
/// Pieces that may be on their way: far more than any window.
const ON_THE_WAY: usize = 4096;

/// Starts a proxy for the server at `to` on loopback and returns its port. It lives as long as the process.
pub fn start(to: u16, round_trip: Duration) -> Result<u16> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            // Who cannot be connected finds that its connection is closed.
            let Ok(server) = TcpStream::connect(("127.0.0.1", to)) else { continue };
            let _gone = join(client, server, round_trip / 2);
        }
    });
    Ok(port)
}

fn join(client: TcpStream, server: TcpStream, delay: Duration) -> std::io::Result<()> {
    for stream in [&client, &server] {
        stream.set_nodelay(true)?;
    }
    one_way(client.try_clone()?, server.try_clone()?, delay);
    one_way(server, client, delay);
    Ok(())
}

fn one_way(mut from: TcpStream, mut to: TcpStream, delay: Duration) {
    let (sender, receiver) = mpsc::sync_channel::<(Instant, Vec<u8>)>(ON_THE_WAY);
    std::thread::spawn(move || {
        let mut piece = vec![0; PIECE];
        while let Ok(count @ 1..) = from.read(&mut piece) {
            if sender.send((Instant::now() + delay, piece[..count].to_vec())).is_err() {
                break;
            }
        }
    });
    std::thread::spawn(move || {
        for (due, bytes) in receiver {
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            if to.write_all(&bytes).is_err() {
                break;
            }
        }
        let _closed = to.shutdown(Shutdown::Write);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_arrive_late_and_whole() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = start(listener.local_addr().unwrap().port(), Duration::from_millis(40)).unwrap();
        let begin = Instant::now();
        let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        client.write_all(b"ping").unwrap();
        let mut word = [0; 4];
        server.read_exact(&mut word).unwrap();
        server.write_all(&word).unwrap();
        client.read_exact(&mut word).unwrap();
        assert_eq!(&word, b"ping");
        assert!(begin.elapsed() >= Duration::from_millis(40), "{:?}", begin.elapsed());
        drop(server);
        assert_eq!(client.read(&mut word).unwrap(), 0);
    }
}
