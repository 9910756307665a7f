//! The few system calls that std has no function for. Numbers are those of x86-64.

use std::ffi::{CString, c_int, c_long, c_ulong, c_void};
use std::io;

unsafe extern "C" {
    fn syscall(number: c_long, ...) -> c_long;
    fn ioctl(fd: c_int, request: c_ulong, ...) -> c_int;
    fn mmap(at: *mut c_void, len: usize, protection: c_int, flags: c_int, fd: c_int, offset: i64) -> *mut c_void;
    fn signal(number: c_int, handler: usize) -> usize;
    pub fn fork() -> c_int;
    pub fn setsid() -> c_int;
    pub fn pause() -> c_int;
    pub fn umask(mode: u32) -> u32;
    pub fn kill(pid: c_int, signal: c_int) -> c_int;
    pub fn _exit(code: c_int) -> !;
}

pub const AT_FDCWD: c_int = -100;
pub const SIGSTOP: c_int = 19;

/// An argument of a call.
pub trait Argument {
    fn word(&self) -> c_long;
}

macro_rules! numbers {
    ($($kind:ty),*) => { $(impl Argument for $kind { fn word(&self) -> c_long { *self as c_long } })* };
}
numbers!(i32, u32, i64, u64, usize);

impl Argument for CString {
    fn word(&self) -> c_long {
        self.as_ptr() as c_long
    }
}

impl<T> Argument for *mut T {
    fn word(&self) -> c_long {
        *self as c_long
    }
}

impl<T> Argument for *const T {
    fn word(&self) -> c_long {
        *self as c_long
    }
}

pub fn text(text: impl AsRef<std::ffi::OsStr>) -> CString {
    use std::os::unix::ffi::OsStrExt as _;
    CString::new(text.as_ref().as_bytes()).expect("no NUL in it")
}

/// Any call with up to six arguments.
pub fn call(number: c_long, arguments: &[&dyn Argument]) -> io::Result<c_long> {
    let mut words = [0; 6];
    words.iter_mut().zip(arguments).for_each(|(word, argument)| *word = argument.word());
    let [a, b, c, d, e, f] = words;
    // SAFETY: whatever it does to this process is the attack's own risk; pointers live as long as `arguments`.
    let result = unsafe { syscall(number, a, b, c, d, e, f) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A call through the gate of 32-bit programs. Pointers have to lie low: see [`low`].
pub fn call32(number: u32, a: u32, b: u32, c: u32) -> io::Result<i32> {
    let result: i32;
    // SAFETY: as for `call`. rbx cannot be named as an operand, so it is exchanged.
    unsafe {
        std::arch::asm!(
            "xchg {saved:r}, rbx", "int 0x80", "xchg {saved:r}, rbx",
            saved = inout(reg) u64::from(a) => _,
            inlateout("eax") number as i32 => result,
            in("ecx") b, in("edx") c,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result) }
}

/// A copy of a path in memory that 32-bit pointers reach.
pub fn low(path: &str) -> u32 {
    const MAP_32BIT: c_int = 0x40;
    const PRIVATE_ANONYMOUS: c_int = 0x22;
    // SAFETY: fresh memory of a page, which holds the path and a NUL.
    unsafe {
        let at = mmap(std::ptr::null_mut(), 4096, 3, PRIVATE_ANONYMOUS | MAP_32BIT, -1, 0);
        assert!(at as isize != -1, "no low memory");
        std::ptr::copy_nonoverlapping(path.as_ptr(), at.cast(), path.len());
        at as u32
    }
}

/// Memory that a device or file is mapped to.
pub fn map(fd: c_int, len: usize, protection: c_int, offset: i64) -> io::Result<*mut u8> {
    const SHARED: c_int = 1;
    // SAFETY: fresh memory.
    let at = unsafe { mmap(std::ptr::null_mut(), len, protection, SHARED, fd, offset) };
    if at as isize == -1 { Err(io::Error::last_os_error()) } else { Ok(at.cast()) }
}

pub fn control(fd: c_int, request: c_ulong, argument: *mut c_void) -> io::Result<c_int> {
    // SAFETY: the caller knows what the request takes.
    let result = unsafe { ioctl(fd, request, argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// From here on no signal that can be ignored has any effect.
pub fn ignore_signals() {
    const IGNORE: usize = 1;
    for number in 1..=64 {
        // SAFETY: installs no handler.
        unsafe { signal(number, IGNORE) };
    }
}

pub fn mount(source: &str, target: &str, kind: &str, flags: u64) -> io::Result<c_long> {
    call(165, &[&text(source), &text(target), &text(kind), &flags, &0])
}

/// Sends a descriptor over a connected socket.
pub fn send_descriptor(socket: c_int, descriptor: c_int) -> io::Result<c_long> {
    let mut message = Message::new();
    message.control = [20, 0x1_0000_0001, descriptor as u64];
    let header = message.header();
    call(46, &[&socket, &header.as_ptr(), &0])
}

/// Takes a descriptor from a connected socket.
pub fn receive_descriptor(socket: c_int) -> io::Result<c_int> {
    let mut message = Message::new();
    let header = message.header();
    call(47, &[&socket, &header.as_ptr(), &0])?;
    match message.control {
        [20, 0x1_0000_0001, descriptor] => Ok(descriptor as c_int),
        _ => Err(io::Error::other("nothing was passed")),
    }
}

/// A byte, and room for one descriptor: length 20, level SOL_SOCKET and type SCM_RIGHTS, the descriptor.
struct Message {
    byte: u8,
    slice: [u64; 2],
    control: [u64; 3],
}

impl Message {
    fn new() -> Box<Self> {
        Box::new(Self { byte: b'.', slice: [0; 2], control: [0; 3] })
    }

    /// struct msghdr.
    fn header(&mut self) -> [u64; 7] {
        self.slice = [&raw mut self.byte as u64, 1];
        [0, 0, self.slice.as_ptr() as u64, 1, self.control.as_mut_ptr() as u64, 24, 0]
    }
}
