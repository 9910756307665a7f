//! Takes the steps of a plan in order, in the process that becomes the builder. It decides nothing: the order is the
//! plan's, the acts are the kernel's, and whatever fails is the end.

use super::kernel::Kernel;
use super::launch::Report;
use super::plan::{Command, Step};
use super::refusal::refusal;

/// Takes the steps in order and stops at the first that fails, which the report names. Otherwise returns after
/// [`Step::Exit`], or when a built-in builder has ended: the exit code.
pub(crate) fn run(
    steps: &[Step],
    command: &Command,
    kernel: &mut dyn Kernel,
    before_exec: &mut dyn FnMut(),
) -> Result<i32, Report> {
    for step in steps {
        let result = match step {
            Step::Session => kernel.session(),
            Step::DieWithParent => kernel.die_with_parent(),
            Step::OomFirst => kernel.oom_first(),
            Step::Loopback => kernel.loopback(),
            Step::HostNames { host, domain } => kernel.host_names(host, domain),
            Step::PrivateMounts => kernel.private_mounts(),
            Step::Bind { source, target } => kernel.bind(source, target),
            Step::ReadOnly { target } => kernel.read_only(target),
            Step::ReadOnlyBelow { target } => kernel.read_only_below(target),
            Step::MountProc { target } => kernel.mount_proc(target),
            Step::PrivateTerminals => kernel.private_terminals(),
            Step::MountShm { target } => kernel.mount_shm(target),
            Step::CgroupNamespace => kernel.cgroup_namespace(),
            Step::PivotRoot { root } => kernel.pivot_root(root),
            Step::MoveRoot { root } => kernel.move_root(root),
            Step::NoNewPrivileges => kernel.no_new_privileges(),
            Step::FilterSyscalls { network } => kernel.filter_syscalls(*network),
            Step::ScopeSockets => kernel.scope_sockets(),
            Step::ConfineFiles { writable, readable } => kernel.confine_files(writable, readable),
            Step::Personality { linux32 } => kernel.personality(*linux32),
            Step::ChangeDir { path } => kernel.change_dir(path),
            Step::CloseDescriptors => kernel.close_descriptors(),
            Step::LimitsAndUmask => kernel.limits_and_umask(),
            Step::Ids { uid, gid } => kernel.ids(*uid, *gid),
            Step::Exit => return Ok(0),
            Step::Exec => {
                before_exec();
                return match command {
                    Command::Program(program) => {
                        let error = kernel.exec(program);
                        let program = program.program.to_string_lossy();
                        Err(Report::NotExecuted(format!("cannot execute {program}: {error}")))
                    }
                    Command::Builtin(job) => kernel.builtin(job).map_err(|error| {
                        Report::NotExecuted(format!("cannot run builtin:{}: {error}", job.name))
                    }),
                };
            }
        };
        result.map_err(|error| Report::Failed(refusal(&step.act(), &error, step.advice())))?;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::builtin::Job;
    use crate::sandbox::double::{Recorder, bare_layout, layout};
    use crate::sandbox::plan::{
        BareLayout, Layout, Program, bare_probe_steps, bare_steps, build_steps, probe_steps,
    };

    /// Takes all steps; what was done, and how often the builder was announced.
    fn acts(steps: &[Step]) -> (Vec<String>, usize) {
        let (mut kernel, mut ready) = (Recorder::default(), 0);
        let end = run(steps, &Command::default(), &mut kernel, &mut || ready += 1);
        match end {
            // There is no program that the double could execute.
            Err(Report::NotExecuted(_)) => assert_eq!(kernel.acts.last().map(String::as_str), Some("exec")),
            other => assert_eq!((other, steps.last()), (Ok(0), Some(&Step::Exit))),
        }
        (kernel.acts, ready)
    }

    const CONFINED: [&str; 15] = [
        "read-only below /r/nix/store",
        "proc /r/proc",
        "shm /r/dev/shm",
        "pivot /r",
        "terminals",
        "no new privileges",
        "filter",
        "scope",
        "personality 64",
        "cd /build",
        "close",
        "limits",
        "ids 1000 100",
        "die with parent",
        "exec",
    ];

    #[test]
    fn an_ordinary_build_in_the_order_of_nix() {
        let begin = [
            "session",
            "die with parent",
            "oom first",
            "loopback",
            "names localhost (none)",
            "private mounts",
            "bind /r /r",
            "read-only /r",
            "bind /s/x.drv.chroot/store /r/nix/store",
            "bind /s/in /r/nix/store/in",
        ];
        assert_eq!(
            acts(&build_steps(&layout())),
            ([&begin[..], &CONFINED].concat().iter().map(ToString::to_string).collect(), 1)
        );
    }

    #[test]
    fn a_build_with_the_network_for_32_bits_in_a_control_group() {
        let fetcher = Layout {
            private_network: false,
            linux32: true,
            shm: false,
            cgroup: true,
            binds: vec![("/etc/hosts".into(), "/etc/hosts".into())],
            ..layout()
        };
        let expected = [
            "session",
            "die with parent",
            "oom first",
            "names localhost (none)",
            "private mounts",
            "bind /r /r",
            "read-only /r",
            "bind /s/x.drv.chroot/store /r/nix/store",
            "bind /etc/hosts /r/etc/hosts",
            "read-only /r/etc/hosts",
            "read-only below /r/nix/store",
            "proc /r/proc",
            "control group namespace",
            "pivot /r",
            "terminals",
            "no new privileges",
            "filter",
            "scope",
            "personality 32",
            "cd /build",
            "close",
            "limits",
            "ids 1000 100",
            "die with parent",
            "exec",
        ];
        assert_eq!(acts(&build_steps(&fetcher)), (expected.map(str::to_owned).to_vec(), 1));
    }

    #[test]
    fn where_pivot_root_is_refused_the_root_is_moved_at_the_same_place() {
        let moved = |steps: Vec<Step>| acts(&steps).0;
        let by_admin = Layout { move_root: true, ..layout() };
        for (pivots, moves) in [
            (moved(build_steps(&layout())), moved(build_steps(&by_admin))),
            (moved(probe_steps(Path::new("/r"), false)), moved(probe_steps(Path::new("/r"), true))),
        ] {
            let expected: Vec<String> = pivots
                .iter()
                .map(|act| if act == "pivot /r" { "move /r".into() } else { act.clone() })
                .collect();
            assert!(moves != pivots && moves == expected, "{moves:?}");
        }
    }

    #[test]
    fn a_build_whose_sandbox_is_the_pod() {
        let expected = [
            "session",
            "die with parent",
            "oom first",
            "no new privileges",
            "filter, no network",
            "scope",
            "files /nix/store /build /tmp /dev /proc, read /bin",
            "personality 64",
            "cd /build",
            "close",
            "limits",
            "ids 30001 30000",
            "die with parent",
            "exec",
        ];
        assert_eq!(acts(&bare_steps(&bare_layout())), (expected.map(str::to_owned).to_vec(), 1));
        let fetcher = BareLayout { network: true, ..bare_layout() };
        assert_eq!(acts(&bare_steps(&fetcher)).0[4], "filter");
    }

    #[test]
    fn builtin_builders_are_confined_like_others() {
        let job = Command::Builtin(Job { name: "fetchurl".into(), ..Job::default() });
        for steps in [build_steps(&layout()), bare_steps(&bare_layout())] {
            let (mut kernel, mut ready) = (Recorder::default(), 0);
            assert_eq!(run(&steps, &job, &mut kernel, &mut || ready += 1), Ok(7));
            let (mut program, _) = acts(&steps);
            assert_eq!(program.pop().as_deref(), Some("exec"));
            assert_eq!((kernel.acts.pop().as_deref(), ready), (Some("builtin fetchurl"), 1));
            assert_eq!(kernel.acts, program);
        }
    }

    #[test]
    fn trials_execute_nothing() {
        for steps in [probe_steps(Path::new("/p"), false), bare_probe_steps(7, 8)] {
            let (acts, ready) = acts(&steps);
            assert!(!acts.contains(&"exec".to_owned()) && ready == 0, "{acts:?}");
            assert_eq!(acts.len(), steps.len() - 1);
        }
    }

    #[test]
    fn every_step_that_fails_is_the_last_and_has_an_error_of_its_own() {
        let with_everything = Layout { cgroup: true, ..layout() };
        let kinds = [
            build_steps(&with_everything),
            bare_steps(&bare_layout()),
            probe_steps(Path::new("/p"), false),
            probe_steps(Path::new("/p"), true),
            bare_probe_steps(7, 8),
        ];
        for steps in kinds {
            for (index, step) in
                steps.iter().enumerate().filter(|(_, step)| !matches!(step, Step::Exec | Step::Exit))
            {
                let (mut kernel, mut ready) = (Recorder::failing_at(index), 0);
                let end = run(&steps, &Command::default(), &mut kernel, &mut || ready += 1);
                let expected = refusal(&step.act(), &Recorder::error(), step.advice());
                assert_eq!(end, Err(Report::Failed(expected)), "{step:?}");
                assert_eq!((kernel.acts.len(), ready), (index + 1, 0), "{:?}", kernel.acts);
                assert!(!kernel.acts.contains(&"exec".to_owned()));
            }
        }
    }

    #[test]
    fn a_program_that_cannot_be_executed_is_not_the_sandboxs_fault() {
        let command = Command::Program(Program { program: c"/no/such".into(), ..Program::default() });
        let end = run(&[Step::Exec], &command, &mut Recorder::default(), &mut || ());
        assert!(matches!(end, Err(Report::NotExecuted(why)) if why.contains("/no/such")));
    }
}
