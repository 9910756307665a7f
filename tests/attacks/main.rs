//! What hostile builders do. One program that is an input of the builds which run it: `attack MARK NAME ARGUMENT…`, where
//! the mark is what the tests know its processes by.
//!
//! Each attempt is reported as a line `attempt NAME: RESULT` on standard output, where RESULT is `worked` or the error's
//! name; the tests say what each has to be. `ready` means that the test is to look from outside before a file `go` in the
//! build directory lets it go on; the last line is `over`.
//!
//! Compiled by the tests themselves, with nothing but the standard library, so that it runs in an empty sandbox.

mod escape;
mod floods;
mod leave;
mod modes;
mod outputs;
mod smuggle;
mod sys;

use std::fmt::Debug;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

fn main() {
    let words: Vec<String> = std::env::args().collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[2..] {
        ["with-key", ref command @ ..] => leave::with_key(command),
        ["nothing"] => std::fs::write(out(), "nothing\n"),
        ["identity"] => escape::identity(),
        ["escape"] => escape::escape(),
        ["terminal", path] => escape::terminal(path),
        ["capability"] => modes::capability(),
        ["modes"] => modes::modes(),
        ["give", name] => smuggle::give(name),
        ["take", name] => smuggle::take(name),
        ["hold-open"] => smuggle::hold_open(),
        ["plant", ref names @ ..] => outputs::plant(names),
        ["output", kind] => outputs::output(kind),
        ["tree", count] => outputs::tree(number(count)),
        ["files"] => outputs::files(),
        ["names"] => outputs::names(),
        ["long", count] => outputs::long(number(count)),
        ["deep", count] => outputs::deep(number(count)),
        ["many", count] => outputs::many(number(count)),
        ["sparse", size] => outputs::sparse(number(size) as u64),
        ["survive"] => leave::survive(),
        ["leave"] => leave::leave(),
        ["search"] => leave::search(),
        ["deaf"] => floods::deaf(),
        ["stop"] => floods::stop(),
        ["bomb"] => floods::bomb(),
        ["hog"] => floods::hog(),
        ["fill", code] => floods::fill(number(code) as i32),
        ["line", bytes] => floods::line(number(bytes)),
        ["escapes"] => floods::escapes(),
        ["terminals"] => floods::terminals(),
        _ => panic!("unknown attack {words:?}"),
    };
    if let Err(error) = result {
        say(&format!("the attack itself failed: {error}"));
        std::process::exit(1);
    }
    say("over");
}

fn number(word: &str) -> usize {
    word.parse().expect("a number")
}

fn say(line: &str) {
    // In one piece: others write to the same terminal.
    let _ = io::stdout().write_all(format!("{line}\n").as_bytes());
}

fn attempt<T: Debug>(name: &str, result: io::Result<T>) {
    match result {
        Ok(_) => say(&format!("attempt {name}: worked")),
        Err(error) => say(&format!("attempt {name}: {}", name_of(&error))),
    }
}

/// The name of an error, as far as attacks meet it.
fn name_of(error: &io::Error) -> String {
    let name = match error.raw_os_error() {
        Some(1) => "EPERM",
        Some(2) => "ENOENT",
        Some(3) => "ESRCH",
        Some(5) => "EIO",
        Some(6) => "ENXIO",
        Some(9) => "EBADF",
        Some(11) => "EAGAIN",
        Some(12) => "ENOMEM",
        Some(13) => "EACCES",
        Some(16) => "EBUSY",
        Some(17) => "EEXIST",
        Some(18) => "EXDEV",
        Some(19) => "ENODEV",
        Some(20) => "ENOTDIR",
        Some(22) => "EINVAL",
        Some(25) => "ENOTTY",
        Some(28) => "ENOSPC",
        Some(30) => "EROFS",
        Some(38) => "ENOSYS",
        Some(61) => "ENODATA",
        Some(95) => "ENOTSUP",
        Some(111) => "ECONNREFUSED",
        Some(126) => "ENOKEY",
        _ => return format!("{error}"),
    };
    name.into()
}

fn out() -> PathBuf {
    std::env::var_os("out").expect("a derivation has `out`").into()
}

/// Tells the test that it may look, and waits until it has.
fn ready() {
    say("ready");
    while !Path::new("/build/go").exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
}
