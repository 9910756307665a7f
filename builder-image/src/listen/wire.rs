//! The TCP connection under SSH: its options, and the plug to pull when it has to go whatever it is doing.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::net::{Shutdown, shutdown, sockopt};
use tokio::io::{AsyncRead, AsyncWrite, BufReader, ReadBuf};
use tokio::net::TcpStream;

/// A peer that acknowledges nothing, or takes nothing, for this long is gone. This is for connections whose task waits
/// to write: it asks no questions then. SSH's own keepalives are for the rest.
const GONE_AFTER: Duration = Duration::from_secs(120);
/// When the kernel asks a silent peer whether it is there, and how often.
const KERNEL_KEEPALIVE: Duration = Duration::from_secs(60);
/// Arrivals of less than this are acknowledged at once.
const SMALL: usize = 8 << 10;
/// Read from the kernel at once: several of SSH's packets of 32 KiB.
const READ_AHEAD: usize = 128 << 10;

/// A connection with read-ahead.
pub(super) type Wire = BufReader<Prompt>;

/// What ends a connection from outside.
pub(super) struct Plug(OwnedFd);

impl Plug {
    /// Reads end, writes fail.
    pub(super) fn pull(&self) {
        let _gone_already = shutdown(&self.0, Shutdown::Both);
    }
}

/// Sets a connection up.
pub(super) fn wire(stream: TcpStream) -> io::Result<(Wire, Plug)> {
    let plug = Plug(stream.as_fd().try_clone_to_owned()?);
    stream.set_nodelay(true)?;
    sockopt::set_tcp_user_timeout(&stream, GONE_AFTER.as_millis() as u32)?;
    sockopt::set_socket_keepalive(&stream, true)?;
    sockopt::set_tcp_keepidle(&stream, KERNEL_KEEPALIVE)?;
    Ok((BufReader::with_capacity(READ_AHEAD, Prompt(stream)), plug))
}

/// A connection that acknowledges small arrivals at once. OpenSSH's client leaves Nagle's algorithm on: its second
/// small packet in a row waits until the first is acknowledged, which the kernel delays by 40 ms. One such pair is in
/// every key exchange, and one wherever a request follows a window adjustment.
pub(super) struct Prompt(TcpStream);

impl AsyncRead for Prompt {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.0).poll_read(context, buffer))?;
        if (1..SMALL).contains(&(buffer.filled().len() - before)) {
            // The kernel takes it back by itself before long. Without it things are slower, no more.
            let _slower = sockopt::set_tcp_quickack(&self.0, true);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Prompt {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}
