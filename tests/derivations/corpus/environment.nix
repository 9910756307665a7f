# Which variables a builder has, in which order, and who wins (derivation-builder.cc, initEnv).
lib: with lib;
let
  # As execve had it: the shell's own idea of its environment is another.
  dump = "cat /proc/$$/environ > $out";
in {
  plain = builds dump { };
  # Sorted by name, whatever the order of the text.
  order = builds dump { zz = "1"; Z = "2"; _ = "3"; a = "4"; A = "5"; a1 = "6"; a_ = "7"; };
  # The derivation wins over PATH, HOME, NIX_STORE and NIX_BUILD_CORES …
  overrides = builds "export PATH=${tools}/bin; ${dump}" {
    PATH = "/mine"; HOME = "/home/mine"; NIX_STORE = "/other/store"; NIX_BUILD_CORES = "77";
  };
  # … and loses against the build directory's names, the log's descriptor and TERM.
  overridden = builds dump {
    NIX_BUILD_TOP = "/mine"; TMPDIR = "/mine"; TEMPDIR = "/mine"; TMP = "/mine"; TEMP = "/mine"; PWD = "/mine";
    NIX_LOG_FD = "7"; TERM = "dumb";
  };
  odd-names = builds dump {
    "with space" = "1"; "with.dot" = "2"; "with-dash" = "3"; "with=sign" = "4"; "1digit" = "5"; "ünïcode" = "6"; "a\nb" = "7";
  };
  empty-name = served "a BuildRequest refuses a variable without a name" (builds dump { "" = "nameless"; });
  odd-values = builds dump {
    newline = "a\nb\n"; tab = "a\tb"; return = "a\rb"; quotes = "'\"`$(x)\${y}"; backslash = "a\\b\\n"; spaces = "  a  ";
    unicode = "żółć 漢字 🦀"; empty = ""; escape = builtins.fromJSON "\"\\u001b[31m\\u0001\\u007f\"";
  };
  # Strings of the language may hold any bytes but NUL; a BuildRequest is JSON.
  binary = served "a BuildRequest is JSON, which has no bytes that are not UTF-8" (builds dump {
    bytes = builtins.readFile ./bytes;
  });
  of-types = builds dump {
    yes = true; no = false; nothing = null; number = 42; list = [ "a b" 1 true null [ "nested" ] ]; path = ./bytes;
    derivation = leaf; several = [ leaf tree.dev ];
  };
  # The kernel takes 131071 bytes and a NUL in one string, and no more.
  big = builds "echo \${#big} $PATH > $out" {
    big = builtins.concatStringsSep "" (builtins.genList (_: "0123456789abcdef") 8190);
  };
  too-big = fails "echo never > $out" {
    big = builtins.concatStringsSep "" (builtins.genList (_: "0123456789abcdef") 8192);
  };
  # Ordinary entries that the evaluator puts there.
  outputs = builds "cat /proc/$$/environ > $out; echo $b > $a; touch $b" { outputs = [ "out" "a" "b" ]; };
}
