# Structured attributes: both files, byte for byte.
lib: with lib;
let
  dump = prelude + ''
    { cat "$NIX_ATTRS_JSON_FILE"; echo; cat "$NIX_ATTRS_SH_FILE"; stat -c '%n %a %u %g' /build/.attrs.*; } > $out
  '';
  make = attrs: builds dump (structured // attrs);
in {
  plain = make { };
  environment = builds (prelude + "cat /proc/$$/environ > $out") (structured // { SOME = "variable"; HOME = "/mine"; });
  strings = make {
    empty = ""; quotes = "it's \"quoted\" \\ `x` $y"; lines = "a\nb\r\n\tc"; unicode = "żółć 漢字 🦀 \u0020";
    control = builtins.fromJSON "\"\\u0001\\u001b\\u007f\\u2028\""; slash = "</script>";
  };
  integers = make { zero = 0; one = 1; minus = -17; large = 9223372036854775807; small = (-9223372036854775807) - 1; };
  # Integral ones are in the shell's file, the others only in the JSON.
  floats = make { half = 0.5; tenth = 0.1; third = 1.0 / 3; whole = 2.0; minus = -1.25; big = 1.0e100; tiny = 1.0e-7; million = 1000000.0; precise = 123456789.12345678; most = 1.7976931348623157e308; };
  literals = make { yes = true; no = false; nothing = null; list = [ true false null 1 "a" ]; };
  lists = make { none = [ ]; one = [ "a" ]; words = [ "a b" "c'd" "" "\n" ]; numbers = [ 1 2.0 3.5 ]; mixed = [ "a" 1 ]; nested = [ [ 1 ] "x" ]; };
  tables = make {
    none = { }; one = { a = "b"; }; odd = { "a b" = 1; "c'd" = 2; "" = 3; "é" = 4; }; numbers = { a = 1; b = 2.5; };
    nested = { a = { b = { c = [ { d = null; } ]; }; }; };
  };
  # Only names that a shell takes are in its file.
  names = make { "a-b" = 1; "1a" = 2; "a.b" = 3; "_a1" = 4; "A" = 5; "é" = 6; "a b" = 7; };
  outputs = builds (dump + "echo dev > ${builtins.placeholder "dev"}") (structured // {
    outputs = [ "out" "dev" ]; value = "${builtins.placeholder "dev"}/lib"; list = [ (builtins.placeholder "out") ];
  });
  inputs = make { one = leaf; list = [ source tree.dev ]; table = { "${builtins.unsafeDiscardStringContext "k"}" = tree; }; };
  graph = make { exportReferencesGraph = { closure = [ tree.dev leaf ]; one = source; }; };
  graph-nested = make { exportReferencesGraph = { closure = [ [ tree ] [ leaf [ source ] ] ]; }; };
  # Not a table: a warning and nothing more.
  graph-of-no-table = make { exportReferencesGraph = [ "closure" leaf ]; };
  graph-over-an-attribute = make { closure = "mine"; exportReferencesGraph.closure = [ leaf ]; };
  large = make { text = builtins.genList (n: { number = n; text = "text ${toString n}"; }) 3000; };
}
