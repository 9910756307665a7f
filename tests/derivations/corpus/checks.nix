# What derivations demand of their own outputs.
lib: with lib;
let
  refers = "echo ${leaf} > $out";
  both = { outputs = [ "out" "dev" ]; };
  # Demands of one output, with structured attributes.
  check = checks: structured // { outputChecks = checks; };
  kilobytes = n: prelude + "head -c ${toString (n * 1000)} /dev/zero > $out";
in {
  allowed = builds refers { allowedReferences = [ leaf ]; };
  allowed-none = rejects refers { allowedReferences = [ ]; };
  allowed-none-and-none-there = builds "echo > $out" { allowedReferences = [ ]; };
  allowed-others = rejects "echo ${leaf} ${source} > $out" { allowedReferences = [ leaf ]; };
  allowed-by-output = builds "echo $dev > $out; echo > $dev" (both // { allowedReferences = [ "dev" ]; });
  allowed-by-output-of-others = rejects "echo $dev > $out; echo ${leaf} > $dev" (both // { allowedReferences = [ "dev" ]; });
  allowed-itself = builds "echo $out > $out" { allowedReferences = [ "out" ]; };
  allowed-none-and-refers-to-itself = rejects "echo $out > $out" { allowedReferences = [ ]; };
  allowed-of-an-unknown-output = rejects "echo > $out" { allowedReferences = [ "nothing" ]; };
  allowed-below = rejects refers { allowedReferences = [ "${leaf}/below" ]; };

  requisites = builds refers { allowedRequisites = [ leaf source ]; };
  requisites-incomplete = rejects refers { allowedRequisites = [ leaf ]; };
  requisites-itself = builds "echo $out > $out" { allowedRequisites = [ ]; };
  requisites-by-output = builds "echo $dev > $out; echo > $dev" (both // { allowedRequisites = [ "dev" ]; });

  disallowed = rejects refers { disallowedReferences = [ leaf ]; };
  disallowed-others = builds refers { disallowedReferences = [ source ]; };
  disallowed-by-output = rejects "echo $dev > $out; echo > $dev" (both // { disallowedReferences = [ "dev" ]; });
  disallowed-requisites = rejects refers { disallowedRequisites = [ source ]; };
  disallowed-requisites-others = builds refers { disallowedRequisites = [ tree ]; };
  disallowed-requisites-itself = builds "echo $out > $out" { disallowedRequisites = [ "out" ]; };

  per-output = builds (prelude + "echo ${leaf} > $out; echo > ${builtins.placeholder "dev"}") (check { dev.allowedReferences = [ ]; } // both);
  per-output-wrong = rejects (prelude + "echo > $out; echo ${leaf} > ${builtins.placeholder "dev"}") (check { dev.allowedReferences = [ ]; } // both);
  per-output-requisites = rejects (prelude + refers) (check { out.allowedRequisites = [ leaf ]; });
  per-output-disallowed = rejects (prelude + refers) (check { out.disallowedReferences = [ leaf ]; });
  per-output-disallowed-requisites = rejects (prelude + refers) (check { out.disallowedRequisites = [ source ]; });
  per-output-itself = rejects (prelude + "echo $out > $out") (check { out.allowedRequisites = [ ]; });
  size = builds (kilobytes 10) (check { out.maxSize = 11000; });
  size-too-large = rejects (kilobytes 10) (check { out.maxSize = 10000; });
  # To the byte: a file's contents and what an archive adds.
  size-exact = builds (kilobytes 1) (check { out.maxSize = 1112; });
  size-exceeded-by-one = rejects (kilobytes 1) (check { out.maxSize = 1111; });
  closure = builds (prelude + refers) (check { out.maxClosureSize = 1000; });
  closure-too-large = rejects (prelude + refers) (check { out.maxClosureSize = 300; });
  closure-with-others = rejects (prelude + "echo ${builtins.placeholder "dev"} > $out; head -c 2000 /dev/zero > ${builtins.placeholder "dev"}") (check { out.maxClosureSize = 2000; } // both);
  # Beside structured attributes the plain ones mean nothing.
  plain-beside-structured = builds (prelude + refers) (structured // { allowedReferences = [ ]; });
  # Which is about what is registered.
  discarded = builds (prelude + refers) (check { out.allowedReferences = [ ]; } // { unsafeDiscardReferences.out = true; });
}
