# The command line: argv[0], order, odd strings, and what is rewritten in it.
lib: with lib;
let dump = "cat /proc/$$/cmdline > $out"; in {
  plain = builds dump { args = [ "-ec" dump "zero" "" " " "a\nb" "'\"$x" "żółć" "-n" "" ]; };
  none = fails "" { builder = "${tools}/bin/false"; args = [ ]; };
  of-an-input = builds dump { builder = "${tools}/bin/busybox"; args = [ "sh" "-ec" dump ]; };
  # Placeholders of own outputs become paths, in arguments and variables, whole or inside.
  placeholders = builds "" {
    outputs = [ "out" "dev" ];
    value = "<${builtins.placeholder "out"}:${builtins.placeholder "dev"}>";
    args = [
      "-ec" ''echo "$0" "$1" "$value" > ${builtins.placeholder "out"}; echo dev > ${builtins.placeholder "dev"}''
      "${builtins.placeholder "dev"}/bin" "x${builtins.placeholder "out"}y"
    ];
  };
  # Of an output that there is not: left as it is.
  placeholder-of-nothing = builds "echo ${builtins.placeholder "nothing"} > $out" { };
  many = builds "" { args = [ "-ec" "echo $# $* | sha256sum > $out" ] ++ builtins.genList (n: "argument-${toString n}") 3000; };
  relative-builder = fails "touch $out" { builder = "bin/sh"; };
}
