//! What the builder's SSH server does for those who are in, what it refuses them, and what it survives.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use xtask::run;

use crate::ssh_fixture::{
    Listener, PATIENCE, Session, add_request, dump_request, greeting, object, peak_memory, text,
};

#[test]
fn whatever_is_executed_is_a_session() -> Result<()> {
    let server = Listener::with_id(&[])?;
    for command in
        ["nix-store --serve --write", "drover-builder serve", "anything", "exit 1; cat /etc/passwd"]
    {
        let mut session = Session::start(server.ssh("id", &[]).arg(command))?;
        let (info, nar) = object("an-object", 1000)?;
        session.client.add_to_store_nar(&info, &mut nar.as_slice())?;
        session.end()?;
    }
    // What clients send unasked is no reason to fail.
    for options in [["-o", "SetEnv=A=b"], ["-A", "-T"]] {
        server.try_login("id", &options)?.map_err(anyhow::Error::msg)?;
    }
    server.verify()
}

#[test]
fn nothing_else_is_to_be_had() -> Result<()> {
    let server = Listener::with_id(&[])?;
    // (options before the host, what stands behind it, what ssh says)
    let socket = server.keys().path("forwarded").display().to_string();
    let to_socket = format!("{socket}:127.0.0.1:1");
    let remote_forward = ["-N", "-o", "ExitOnForwardFailure=yes", "-R"];
    let cases: &[(&[&str], &[&str], &str)] = &[
        (&["-T"], &[], "shell request failed"),
        (&["-tt"], &[], "PTY allocation request failed"),
        (&["-s"], &["sftp"], "subsystem request failed"),
        (&["-s"], &["nix-daemon"], "subsystem request failed"),
        (&["-W", "127.0.0.1:1"], &[], "administratively prohibited"),
        (&[&remote_forward[..], &["0:127.0.0.1:1"]].concat(), &[], "remote port forwarding failed"),
        (&[&remote_forward[..], &[&to_socket]].concat(), &[], "remote port forwarding failed"),
    ];
    for (options, behind, said) in cases {
        let output = server.ssh("id", options).args(*behind).output()?;
        let all = text(&output);
        ensure!(!output.status.success() && all.contains(said), "{options:?}: {}: {all}", output.status);
        ensure!(output.stdout.is_empty(), "{options:?}: {all}");
    }
    server.says("asked for a shell, which nobody gets")?;
    server.says("asked for the subsystem \"sftp\"")?;
    // X11 is asked for on the side.
    let mut command = server.ssh("id", &["-Y"]);
    let output = command.env("DISPLAY", ":0").arg("x").output()?;
    ensure!(text(&output).contains("X11 forwarding request failed"), "{}", text(&output));
    // Local forwarding fails when somebody comes through it: to a port, and to a socket.
    for target in ["127.0.0.1:1", "/run/any"] {
        let local = server.keys().path("local");
        let mut ssh = server.ssh("id", &["-N", "-L", &format!("{}:{target}", local.display())]).spawn()?;
        let stream = wait_for("the forwarded socket", || Ok(UnixStream::connect(&local).ok()))?;
        let mut nothing = Vec::new();
        (&stream).read_to_end(&mut nothing)?;
        ensure!(nothing.is_empty());
        ssh.kill()?;
        let output = ssh.wait_with_output()?;
        ensure!(text(&output).contains("administratively prohibited"), "{target}: {}", text(&output));
        std::fs::remove_file(local)?;
    }
    Ok(())
}

#[test]
fn sessions_are_limited() -> Result<()> {
    let server = Listener::with_id(&["--max-sessions", "2"])?;
    let (one, two) = (server.session()?, server.session()?);
    let output = server.ssh("id", &[]).arg("x").output()?;
    ensure!(
        output.status.code() == Some(1) && text(&output).contains("too many sessions"),
        "{}",
        text(&output)
    );
    server.says("too many sessions")?;
    // A client that has seen its session end may come back at once.
    one.end()?;
    for _ in 0..5 {
        server.session()?.end()?;
    }
    two.end()
}

#[test]
fn one_connection_carries_several_sessions() -> Result<()> {
    let server = Listener::with_id(&[])?;
    let path = server.keys().path("control").display().to_string();
    // It says a line for each channel that it does not get.
    let mut master = server.ssh("id", &["-N", "-M", "-S", &path]).stderr(Stdio::null()).spawn()?;
    wait_for("the master", || Ok(server.keys().path("control").exists().then_some(())))?;
    // Without the master there is nothing at the port that these know.
    let through = || {
        let mut ssh = Command::new("ssh");
        ssh.args(["-F", "none", "-o", "BatchMode=yes", "-p", "1", "-S", &path, "root@127.0.0.1", "x"]);
        ssh.stdout(Stdio::piped()).stderr(Stdio::piped());
        ssh
    };
    let start = || Session::start(&mut through());
    let (mut one, mut two) = (start()?, start()?);
    let (first, first_nar) = object("first", 3_000_000)?;
    let (second, second_nar) = object("second", 3_000_001)?;
    // Each in the middle of its upload, in turns, and each sees what the other has done.
    std::thread::scope(|scope| -> Result<()> {
        let other = scope.spawn(|| one.client.add_to_store_nar(&first, &mut first_nar.as_slice()));
        two.client.add_to_store_nar(&second, &mut second_nar.as_slice())?;
        other.join().ok().context("a client panicked")??;
        Ok(())
    })?;
    for session in [&mut one, &mut two] {
        let both = [first.path.clone(), second.path.clone()].into();
        ensure!(session.client.query_valid_paths(&both, true, false)? == both);
    }
    // Killing one does not end the other.
    one.ssh.kill()?;
    one.ssh.wait()?;
    two.client.dump_store_path(&first.path, &mut std::io::sink())?;
    two.end()?;
    // There is room for 16 channels at once, and no more.
    let free = |_| wait_for("a channel", || Ok(start().ok()));
    let many = (0..16).map(free).collect::<Result<Vec<_>>>()?;
    let output = through().output()?;
    ensure!(output.status.code() == Some(255), "a 17th session: {}", text(&output));
    server.says("asked for too many channels")?;
    many.into_iter().try_for_each(Session::end)?;
    ensure!(server.log_text().matches("logged in as").count() == 1, "{}", server.log_text());
    master.kill()?;
    master.wait()?;
    server.verify()
}

#[test]
fn who_does_not_log_in_has_to_go() -> Result<()> {
    let server = Listener::with_id(&["--login-grace", "1"])?;
    let begin = Instant::now();
    let mut silent = TcpStream::connect(("127.0.0.1", server.port()))?;
    silent.set_read_timeout(Some(PATIENCE))?;
    let mut banner = Vec::new();
    silent.read_to_end(&mut banner)?;
    ensure!(banner == b"SSH-2.0-drover\r\n", "{banner:?}");
    ensure!(begin.elapsed() >= Duration::from_millis(900), "{:?}", begin.elapsed());
    server.says("did not log in within 1 seconds")?;
    // Who says hello and no more has no more time.
    let mut slow = TcpStream::connect(("127.0.0.1", server.port()))?;
    slow.set_read_timeout(Some(PATIENCE))?;
    slow.write_all(b"SSH-2.0-slow\r\n")?;
    slow.read_to_end(&mut banner)?;
    // And who has logged in has all the time there is.
    let session = server.session()?;
    let mut late = TcpStream::connect(("127.0.0.1", server.port()))?;
    late.read_to_end(&mut banner)?;
    session.end()
}

#[test]
fn strangers_lock_nobody_out() -> Result<()> {
    let server = Listener::with_id(&[])?;
    // Four times what may wait, and all of them stay as long as they are let.
    let strangers =
        (0..256).map(|_| TcpStream::connect(("127.0.0.1", server.port()))).collect::<Result<Vec<_>, _>>()?;
    server.try_login("id", &[])?.map_err(anyhow::Error::msg)?;
    server.says("dropped the oldest of 64 connections that do not log in")?;
    // The oldest are gone, the youngest are not.
    let mut all = Vec::new();
    (&strangers[0]).read_to_end(&mut all)?;
    let mut banner = [0; 16];
    (&strangers[255]).read_exact(&mut banner)?;
    // Their number is no reason to write as many lines.
    ensure!(server.log_text().lines().count() < 100, "{}", server.log_text());
    Ok(())
}

#[test]
fn what_strangers_say_harms_nobody() -> Result<()> {
    let server = Listener::with_id(&["--login-grace", "600"])?;
    let session = server.session()?;
    let version = b"SSH-2.0-stranger\r\n";
    let packet = |length: u32, padding: u8, payload: &[u8]| {
        [&version[..], &length.to_be_bytes(), &[padding], payload].concat()
    };
    let mut said = vec![
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![b'a'; 1 << 20],
        b"\n".repeat(1 << 20),
        b"SSH-1.5-old\r\n".to_vec(),
        packet(u32::MAX, 0, &[]),
        packet(0, 0, &[0; 64]),
        packet(1, 255, &[0; 64]),
        packet(12, 255, &[20; 64]),
        packet(1 << 18, 4, &vec![20; 1 << 18]),
    ];
    // Every kind of message, with contents that make no sense, and key exchanges that are cut off or filled with noise.
    let mut noise = 1_u32;
    let mut noise = || {
        noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (noise >> 24) as u8
    };
    for kind in 0..=255 {
        let length = 1 + usize::from(kind) % 59;
        let mut payload: Vec<u8> = (0..length).map(|_| noise()).collect();
        payload[0] = kind;
        payload.extend([0; 4]);
        said.push(packet(payload.len() as u32 + 1, 4, &payload));
    }
    for length in 0..120 {
        let names =
            (0..10).map(|_| [&8_u32.to_be_bytes()[..], &[noise(); 8]].concat()).collect::<Vec<_>>().concat();
        let mut payload = [&[20][..], &[7; 16], &names, &[0; 5], &[0; 4]].concat();
        payload.truncate(length);
        said.push(packet(payload.len() as u32 + 1, 4, &payload));
    }
    for bytes in &said {
        let mut stream = TcpStream::connect(("127.0.0.1", server.port()))?;
        // It may be closed before all of it is sent.
        let _closed = stream.write_all(bytes);
        let _closed = stream.shutdown(std::net::Shutdown::Write);
        stream.set_read_timeout(Some(PATIENCE))?;
        match stream.read_to_end(&mut Vec::new()) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                anyhow::bail!("a connection is kept open after {:?}", &bytes[..bytes.len().min(40)]);
            }
            _closed => {}
        }
    }
    // Who was in still is, and others get in.
    session.end()?;
    server.try_login("id", &[])?.map_err(anyhow::Error::msg)?;
    let log = server.log_text();
    ensure!(!log.contains("panicked") && log.lines().count() < 100, "{log}");
    let peak = peak_memory(server.pid())?;
    ensure!(peak < 64 << 10, "the server took {peak} KiB");
    Ok(())
}

#[test]
fn many_connections_one_after_another() -> Result<()> {
    let server = Listener::with_id(&["--max-sessions", "100", "--login-grace", "600"])?;
    // More than may wait to log in, in less time than they may take for it, and all of them still there.
    let sessions = (0..70).map(|_| server.session()).collect::<Result<Vec<_>>>()?;
    for _ in 0..10 {
        server.session()?.end()?;
    }
    sessions.into_iter().try_for_each(Session::end)?;
    ensure!(!server.log_text().contains("dropped the oldest"), "{}", server.log_text());
    Ok(())
}

#[test]
fn an_upload_that_is_cut_off_leaves_nothing() -> Result<()> {
    let server = Listener::with_id(&["--max-sessions", "1"])?;
    let (info, nar) = object("cut-off", 8 << 20)?;
    let end = |ssh: &mut Child, how: &str| -> Result<()> {
        match how {
            "killed" => ssh.kill()?,
            // The client says goodbye, or nothing at all: its process goes, and with it the connection.
            "terminated" => run::run(Command::new("kill").arg(ssh.id().to_string()))?,
            _ => drop(ssh.stdin.take()),
        }
        ssh.wait()?;
        Ok(())
    };
    for how in ["killed", "terminated", "closed"] {
        for part in [0, 1, 8 << 10, nar.len() / 2, nar.len() - 1] {
            let mut ssh = server.ssh("id", &[]).arg("x").stdin(Stdio::piped()).spawn()?;
            let mut stdin = ssh.stdin.take().context("piped")?;
            let (hello, answer) = greeting();
            stdin.write_all(&hello)?;
            ssh.stdout.as_mut().context("piped")?.read_exact(&mut vec![0; answer])?;
            stdin.write_all(&add_request(&info))?;
            stdin.write_all(&nar[..part])?;
            ssh.stdin = Some(stdin);
            end(&mut ssh, how)?;
            // One session is all that there may be: the next one waits for this one to be over.
            wait_for("the session to end", || Ok(server.session().ok()))?.end()?;
            ensure!(server.objects()?.is_empty(), "{how} after {part}: {:?}", server.objects()?);
        }
    }
    server.says("the SSH connection broke off")?;
    server.verify()?;
    let mut session = server.session()?;
    ensure!(session.client.query_valid_paths(&[info.path.clone()].into(), true, false)?.is_empty());
    session.client.add_to_store_nar(&info, &mut nar.as_slice())?;
    session.end()?;
    ensure!(server.objects()? == [info.path.as_str()]);
    server.verify()
}

#[test]
fn requests_wait_while_answers_are_taken_slowly() -> Result<()> {
    let server = Listener::with_id(&[])?;
    let (big, big_nar) = object("big", 48 << 20)?;
    let (next, next_nar) = object("next", 48 << 20)?;
    let mut session = server.session()?;
    session.client.add_to_store_nar(&big, &mut big_nar.as_slice())?;
    session.end()?;
    // A client that sends its next request, a large one, while it still reads the answer to the one before: whoever
    // waits for the input to be read before sending output, or the other way round, waits for ever.
    let mut ssh = server.ssh_for(PATIENCE, "id", &[]).arg("x").stdin(Stdio::piped()).spawn()?;
    let (mut stdin, mut stdout) = (ssh.stdin.take().context("piped")?, ssh.stdout.take().context("piped")?);
    let writer = std::thread::spawn(move || -> Result<()> {
        let (hello, _) = greeting();
        let requests = [hello, dump_request(&big), dump_request(&big), add_request(&next), next_nar];
        Ok(requests.iter().try_for_each(|request| stdin.write_all(request))?)
    });
    let mut start = [0; 16 + 1024];
    stdout.read_exact(&mut start)?;
    // Nobody reads for now. Whatever the server holds of requests meanwhile is bounded, and other clients go on.
    for _ in 0..3 {
        server.try_login("id", &[])?.map_err(anyhow::Error::msg)?;
    }
    ensure!(!writer.is_finished(), "48 MiB of requests went somewhere");
    let mut rest = Vec::new();
    stdout.take(2 * big_nar.len() as u64 - 1024 + 8).read_to_end(&mut rest)?;
    writer.join().ok().context("the writer panicked")??;
    ensure!(rest[rest.len() - 8..] == 1_u64.to_le_bytes(), "the addition is not answered");
    ensure!(rest[big_nar.len() - 1024..rest.len() - 8] == big_nar, "another archive comes back");
    ensure!(ssh.wait()?.success());
    let peak = peak_memory(server.pid())?;
    ensure!(peak < 64 << 10, "the server took {peak} KiB");
    server.verify()
}

#[test]
fn a_client_that_dies_with_its_window_closed_frees_its_session() -> Result<()> {
    let server = Listener::with_id(&["--max-sessions", "1"])?;
    let (big, nar) = object("big", 32 << 20)?;
    let mut session = server.session()?;
    session.client.add_to_store_nar(&big, &mut nar.as_slice())?;
    session.end()?;
    let mut ssh = server.ssh("id", &[]).arg("x").stdin(Stdio::piped()).spawn()?;
    let (hello, answer) = greeting();
    let stdin = ssh.stdin.as_mut().context("piped")?;
    stdin.write_all(&[hello, dump_request(&big)].concat())?;
    // Some of the archive comes; the rest waits for the client's window, which stays closed.
    ssh.stdout.as_mut().context("piped")?.read_exact(&mut vec![0; answer + 1024])?;
    wait_for("the window to be used up", || {
        // OpenSSH's is 2 MiB. A pause in between would make this test weaker, not wrong.
        let before = bytes_read(ssh.id())?;
        std::thread::sleep(Duration::from_millis(200));
        Ok((before > 2 << 20 && bytes_read(ssh.id())? == before).then_some(()))
    })?;
    ssh.kill()?;
    ssh.wait()?;
    wait_for("the session to end", || Ok(server.session().ok()))?.end()
}

#[test]
fn told_to_stop_it_waits_for_nobody_who_is_idle() -> Result<()> {
    let mut server = Listener::with_id(&[])?;
    let session = server.session()?;
    let took = server.stop()?;
    ensure!(took < Duration::from_secs(5), "{took:?}");
    let output = { session.ssh }.wait_with_output()?;
    ensure!(!output.status.success(), "the session ended well");
    server.verify()
}

/// What a process has read so far, from whatever it reads.
fn bytes_read(pid: u32) -> Result<u64> {
    let io = std::fs::read_to_string(format!("/proc/{pid}/io"))?;
    let line = io.lines().find_map(|line| line.strip_prefix("rchar: ")).context("no rchar")?;
    Ok(line.parse()?)
}

fn wait_for<T>(what: &str, mut ready: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = ready()? {
            return Ok(value);
        }
        ensure!(Instant::now() < deadline, "{what} never came");
        std::thread::sleep(Duration::from_millis(5));
    }
}
