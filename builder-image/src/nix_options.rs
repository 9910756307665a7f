//! Options of Nix's programs that make sense before or behind `--serve` and change nothing here: forced commands and
//! scripts that were written for `nix-store` go on working. Facts: Nix shared.cc and args.cc (every setting is an option,
//! `--no-NAME` turns one off), legacy.cc.

/// Each is followed by this many words.
const OPTIONS: [(&str, usize); 56] = [
    ("--allowed-users", 1),
    ("--arg", 2),
    ("--argstr", 2),
    ("--auto-optimise-store", 0),
    ("--build-dir", 1),
    ("--build-users-group", 1),
    ("--builders", 1),
    ("--builders-use-substitutes", 0),
    ("--compress-build-log", 0),
    ("--debug", 0),
    ("--experimental-features", 1),
    ("--extra-experimental-features", 1),
    ("--extra-system-features", 1),
    ("--fallback", 0),
    ("--fsync-metadata", 0),
    ("--http-connections", 1),
    ("--keep-build-log", 0),
    ("--keep-failed", 0),
    ("--keep-going", 0),
    ("--log-format", 1),
    ("--log-lines", 1),
    ("--max-build-log-size", 1),
    ("--max-free", 1),
    ("--max-jobs", 1),
    ("--max-silent-time", 1),
    ("--max-substitution-jobs", 1),
    ("--min-free", 1),
    ("--narinfo-cache-negative-ttl", 1),
    ("--narinfo-cache-positive-ttl", 1),
    ("--netrc-file", 1),
    ("--post-build-hook", 1),
    ("--pre-build-hook", 1),
    ("--print-build-logs", 0),
    ("--quiet", 0),
    ("--refresh", 0),
    ("--sandbox", 0),
    ("--sandbox-build-dir", 1),
    ("--sandbox-fallback", 0),
    ("--secret-key-files", 1),
    ("--show-trace", 0),
    ("--ssl-cert-file", 1),
    ("--sync-before-registering", 0),
    ("--timeout", 1),
    ("--trusted-substituters", 1),
    ("--trusted-users", 1),
    ("--use-case-hack", 0),
    ("--use-cgroups", 0),
    ("--use-sqlite-wal", 0),
    ("--verbose", 0),
    ("-I", 1),
    ("-K", 0),
    ("-L", 0),
    ("-Q", 0),
    ("-j", 1),
    ("-k", 0),
    ("-v", 0),
];

/// How many words belong to this option; None for one that is not known, or that would have to be heeded.
pub(crate) fn words_after(option: &str) -> Option<usize> {
    let listed = |name: &str| OPTIONS.iter().find(|(known, _)| *known == name).map(|(_, count)| *count);
    if let Some(off) = option.strip_prefix("--no-") {
        let is_switch = listed(&format!("--{off}")) == Some(0) || off == "build-output";
        return is_switch.then_some(0);
    }
    if option.len() > 2 && option.starts_with("-v") && option[1..].bytes().all(|byte| byte == b'v') {
        return Some(0);
    }
    // `-j4` in one word.
    if option
        .strip_prefix("-j")
        .is_some_and(|jobs| !jobs.is_empty() && jobs.bytes().all(|b| b.is_ascii_digit()))
    {
        return Some(0);
    }
    listed(option)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_and_their_values() {
        for (option, words) in [
            ("--builders", Some(1)),
            ("--arg", Some(2)),
            ("-v", Some(0)),
            ("-vvvvv", Some(0)),
            ("-j4", Some(0)),
            ("-j", Some(1)),
            ("--no-fallback", Some(0)),
            ("--no-substitute", None),
            ("--no-build-output", Some(0)),
            ("--no-builders", None),
            ("--readonly-mode", None),
            ("-x", None),
            ("--", None),
        ] {
            assert_eq!(words_after(option), words, "{option}");
        }
        assert!(OPTIONS.is_sorted(), "for whoever looks for one");
    }
}
