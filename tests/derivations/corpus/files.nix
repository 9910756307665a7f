# passAsFile.
lib: with lib;
let
  dump = ''
    cd /build
    { stat -c '%n %F %a %u %g %s' . .attr-*; for f in .attr-*; do echo "$f"; cat "$f"; done; cat /proc/$$/environ; } > $out
  '';
in {
  several = builds dump {
    passAsFile = [ "text" "empty" "missing" "with-dash" ];
    text = "line\nwithout end"; empty = ""; with-dash = "dashed"; kept = "a variable";
  };
  # Separated by any white space.
  separators = builds dump { passAsFile = "a\n b\tc  "; a = "1"; b = "2"; c = "3"; };
  placeholders = builds dump { passAsFile = [ "text" ]; text = "${builtins.placeholder "out"} ${source}"; };
  binary = served "a BuildRequest is JSON, which has no bytes that are not UTF-8" (builds dump {
    passAsFile = [ "bytes" ]; bytes = builtins.readFile ./bytes;
  });
  # Larger than any variable may be.
  large = builds "sha256sum < $textPath > $out" {
    passAsFile = [ "text" ];
    text = builtins.concatStringsSep "\n" (builtins.genList (n: "line ${toString n} of a large text") 12000);
  };
  # The list itself may be in the list.
  itself = builds dump { passAsFile = [ "passAsFile" "name" ]; };
  # Means nothing with structured attributes.
  structured = builds (prelude + "{ ls -A /build; cat /proc/$$/environ; } > $out") (structured // {
    passAsFile = [ "text" ]; text = "not a file";
  });
}
