# What a builder does not even begin with.
lib: with lib; {
  system = refuses "echo > $out" { system = "riscv64-linux"; };
  feature = refuses "echo > $out" { requiredSystemFeatures = [ "quantum" ]; };
  one-of-the-features = refuses "echo > $out" { requiredSystemFeatures = [ "benchmark" "quantum" ]; };
  features-that-are-there = builds "echo > $out" { requiredSystemFeatures = [ "benchmark" "big-parallel" "nixos-test" ]; };
  structured-feature = refuses (prelude + "echo > $out") (structured // { requiredSystemFeatures = [ "quantum" ]; });
  without-the-sandbox = ends "MiscFailure" "echo > $out" { __noChroot = true; };
  # Only `1` means yes.
  without-the-sandbox-in-vain = builds "echo > $out" { __noChroot = "yes"; };
}
