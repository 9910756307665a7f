//! The system call filter of a build: what Nix forbids, so that no output can carry what a store cannot keep
//! (Nix: linux-derivation-builder.cc, setupSeccomp). Everything else is allowed, but for sockets of the network where no
//! namespace keeps that away. Pure: it computes a program.
//!
//! Written as BPF by hand, since libraries that generate it kill on a foreign architecture, and builders do run
//! 32-bit programs on a 64-bit kernel.

use seccompiler::{BpfProgram, sock_filter};

/// Set-user-ID and set-group-ID.
const PRIVILEGED_MODE: u32 = 0o6000;

/// Numbers of the calls that matter, for one architecture.
struct Table {
    audit_arch: u32,
    /// Bits that do not count in a call's number.
    number_mask: u32,
    /// Number, and which argument is the mode.
    modes: &'static [(u32, u32)],
    /// get, set and list extended attributes in all their forms: nine neighbours. Four more came with Linux 6.13 (set, get,
    /// list and remove, relative to a directory), which have the same numbers everywhere and which Nix does not know yet.
    attributes: [(u32, u32); 2],
    /// socket, and the call that is many on old architectures: with 1 as its first argument it is socket as well, and its
    /// own arguments lie where a filter cannot look.
    socket: u32,
    socketcall: Option<u32>,
}

/// The architectures whose programs the kernel of this one runs. x32 shares numbers with x86-64 but for one bit.
#[cfg(target_arch = "x86_64")]
const TABLES: &[Table] = &[
    Table {
        audit_arch: 0xc000_003e,
        number_mask: !0x4000_0000,
        modes: &[(90, 1), (91, 1), (268, 2), (452, 2)],
        attributes: [(188, 196), (463, 466)],
        socket: 41,
        socketcall: None,
    },
    Table {
        audit_arch: 0x4000_0003,
        number_mask: u32::MAX,
        modes: &[(15, 1), (94, 1), (306, 2), (452, 2)],
        attributes: [(226, 234), (463, 466)],
        socket: 359,
        socketcall: Some(102),
    },
];

#[cfg(target_arch = "aarch64")]
const TABLES: &[Table] = &[
    Table {
        audit_arch: 0xc000_00b7,
        number_mask: u32::MAX,
        modes: &[(52, 1), (53, 2), (452, 2)],
        attributes: [(5, 13), (463, 466)],
        socket: 198,
        socketcall: None,
    },
    Table {
        audit_arch: 0x4000_0028,
        number_mask: u32::MAX,
        modes: &[(15, 1), (94, 1), (333, 2), (452, 2)],
        attributes: [(226, 234), (463, 466)],
        socket: 281,
        socketcall: Some(102),
    },
];

// struct seccomp_data: call number, architecture, instruction pointer, six arguments.
const OFFSET_NUMBER: u32 = 0;
const OFFSET_ARCH: u32 = 4;
const OFFSET_ARGS: u32 = 16;

// Classic BPF (linux/bpf_common.h) and seccomp's answers (linux/seccomp.h).
const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_AT_LEAST: u16 = 0x35;
const JUMP_ABOVE: u16 = 0x25;
const JUMP_ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;
const ALLOW: u32 = 0x7fff_0000;
const ERRNO: u32 = 0x0005_0000;
const EPERM: u32 = 1;
const ENOTSUP: u32 = 95;
const EAFNOSUPPORT: u32 = 97;
const ENOSYS: u32 = 38;
/// Sockets within the machine: AF_UNIX, and AF_NETLINK, by which programs ask what interfaces there are.
const LOCAL_FAMILIES: [u32; 2] = [1, 16];
/// io_uring_setup, on every architecture: what goes through a ring no filter sees, sockets included.
const RING: u32 = 425;

/// The program, for every architecture that this kernel runs.
pub(crate) fn program(network: bool) -> BpfProgram {
    let mut program = Vec::new();
    for table in TABLES {
        let body = table_program(table, network);
        // The body is far below 256 instructions (a test counts them), as far as a conditional jump reaches.
        let skip = u8::try_from(body.len()).unwrap_or(u8::MAX);
        program.push(op(LOAD, OFFSET_ARCH));
        program.push(jump(JUMP_EQUAL, table.audit_arch, 0, skip));
        program.extend(body);
    }
    program.push(op(RETURN, ALLOW));
    program
}

/// Decides for one architecture; every way through it ends in a return.
fn table_program(table: &Table, network: bool) -> BpfProgram {
    let mut program = vec![op(LOAD, OFFSET_NUMBER), op(AND, table.number_mask)];
    for (first, last) in table.attributes {
        program.push(jump(JUMP_AT_LEAST, first, 0, 2));
        program.push(jump(JUMP_ABOVE, last, 1, 0));
        program.push(op(RETURN, ERRNO | ENOTSUP));
    }
    if !network {
        program.extend(no_network(table));
    }
    for (number, argument) in table.modes {
        program.push(jump(JUMP_EQUAL, *number, 0, 4));
        // The low half is the first on both of these little-endian architectures.
        program.push(op(LOAD, OFFSET_ARGS + 8 * argument));
        program.push(jump(JUMP_ANY_BIT, PRIVILEGED_MODE, 0, 1));
        program.push(op(RETURN, ERRNO | EPERM));
        program.push(op(RETURN, ALLOW));
    }
    program.push(op(RETURN, ALLOW));
    program
}

/// Refuses sockets of the network, as a kernel without it would. Leaves the call's number where it was.
fn no_network(table: &Table) -> BpfProgram {
    let [unix, netlink] = LOCAL_FAMILIES;
    let mut program = vec![jump(JUMP_EQUAL, RING, 0, 1), op(RETURN, ERRNO | ENOSYS)];
    program.extend([
        jump(JUMP_EQUAL, table.socket, 0, 5),
        op(LOAD, OFFSET_ARGS),
        jump(JUMP_EQUAL, unix, 2, 0),
        jump(JUMP_EQUAL, netlink, 1, 0),
        op(RETURN, ERRNO | EAFNOSUPPORT),
        op(RETURN, ALLOW),
    ]);
    if let Some(number) = table.socketcall {
        program.extend([
            jump(JUMP_EQUAL, number, 0, 4),
            op(LOAD, OFFSET_ARGS),
            jump(JUMP_EQUAL, 1, 0, 1),
            op(RETURN, ERRNO | EAFNOSUPPORT),
            op(RETURN, ALLOW),
        ]);
    }
    program
}

fn op(code: u16, k: u32) -> sock_filter {
    sock_filter { code, jt: 0, jf: 0, k }
}

fn jump(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel would, for the few instructions that it uses.
    fn decide(program: &[sock_filter], arch: u32, number: u32, args: [u64; 6]) -> u32 {
        let mut data = Vec::new();
        data.extend(number.to_le_bytes());
        data.extend(arch.to_le_bytes());
        data.extend([0; 8]);
        args.iter().for_each(|arg| data.extend(arg.to_le_bytes()));
        let (mut accumulator, mut at) = (0_u32, 0);
        loop {
            let step = &program[at];
            let branch = |taken: bool| usize::from(if taken { step.jt } else { step.jf });
            at += 1;
            match step.code {
                LOAD => {
                    let offset = step.k as usize;
                    accumulator = u32::from_le_bytes(data[offset..offset + 4].try_into().unwrap());
                }
                AND => accumulator &= step.k,
                JUMP_EQUAL => at += branch(accumulator == step.k),
                JUMP_AT_LEAST => at += branch(accumulator >= step.k),
                JUMP_ABOVE => at += branch(accumulator > step.k),
                JUMP_ANY_BIT => at += branch(accumulator & step.k != 0),
                RETURN => return step.k,
                other => panic!("unexpected instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn setuid_modes_and_attributes_are_refused_on_every_architecture() {
        for (program, table) in
            [program(true), program(false)].iter().flat_map(|p| TABLES.iter().map(move |table| (p, table)))
        {
            for (number, argument) in table.modes {
                let mut args = [0; 6];
                for (mode, answer) in
                    [(0o755, ALLOW), (0o4755, ERRNO | EPERM), (0o2000, ERRNO | EPERM), (0o1777, ALLOW)]
                {
                    args[*argument as usize] = mode;
                    assert_eq!(decide(program, table.audit_arch, *number, args), answer, "{number} {mode:o}");
                }
            }
            for (first, last) in table.attributes {
                for number in first..=last {
                    let answer = decide(program, table.audit_arch, number, [0; 6]);
                    assert_eq!(answer, ERRNO | ENOTSUP, "{number}");
                }
                for number in [first - 1, last + 1, 0] {
                    assert_eq!(decide(program, table.audit_arch, number, [0o6777; 6]), ALLOW, "{number}");
                }
            }
        }
    }

    #[test]
    fn sockets_of_the_network_are_refused_where_they_shall_be() {
        let refused = ERRNO | EAFNOSUPPORT;
        for table in TABLES {
            let call = |network, number, first| {
                decide(&program(network), table.audit_arch, number, [first, 1, 0, 0, 0, 0])
            };
            for (family, answer) in
                [(1, ALLOW), (16, ALLOW), (2, refused), (10, refused), (17, refused), (40, refused)]
            {
                assert_eq!(call(false, table.socket, family), answer, "{family}");
                assert_eq!(call(true, table.socket, family), ALLOW);
            }
            if let Some(number) = table.socketcall {
                // connect, 3, is of use with a socket only.
                assert_eq!(
                    [call(false, number, 1), call(false, number, 3), call(true, number, 1)],
                    [refused, ALLOW, ALLOW]
                );
            }
            assert_eq!([call(false, RING, 8), call(true, RING, 8)], [ERRNO | ENOSYS, ALLOW]);
        }
    }

    #[test]
    fn numbers_are_this_architectures() {
        let number = |n: libc::c_long| u32::try_from(n).unwrap();
        let modes: Vec<u32> = TABLES[0].modes.iter().map(|(number, _)| *number).collect();
        for call in [libc::SYS_fchmod, libc::SYS_fchmodat] {
            assert!(modes.contains(&number(call)));
        }
        assert_eq!(TABLES[0].socket, number(libc::SYS_socket));
        assert_eq!(RING, number(libc::SYS_io_uring_setup));
        assert_eq!(TABLES[0].attributes[0], (number(libc::SYS_setxattr), number(libc::SYS_flistxattr)));
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn x32_is_no_way_around() {
        let answer = decide(&program(true), TABLES[0].audit_arch, 90 | 0x4000_0000, [0, 0o4000, 0, 0, 0, 0]);
        assert_eq!(answer, ERRNO | EPERM);
    }

    #[test]
    fn jumps_stay_short() {
        assert!(TABLES.iter().all(|table| table_program(table, false).len() < 255));
    }
}
