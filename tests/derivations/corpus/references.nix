# Which references are found, and where.
lib: with lib;
let
  hash = path: builtins.substring 11 32 (builtins.unsafeDiscardStringContext "${path}");
  # An input that nothing of the output says yet.
  with-leaf = { inherit leaf; };
in {
  in-contents = builds "echo ${leaf} > $out" { };
  in-a-name = builds "mkdir $out; touch $out/${builtins.baseNameOf leaf}" { };
  in-a-symlink = builds "ln -s ${leaf}/x $out" { };
  in-binary = builds "head -c 1000 ${tools}/bin/busybox > $out; printf ${hash leaf} >> $out; printf '\\0\\377' >> $out" with-leaf;
  # The hash part alone counts, wherever it stands.
  by-hash-alone = builds "echo x${hash leaf}y > $out" with-leaf;
  of-another-name = builds "echo /elsewhere/${hash leaf}-renamed > $out" with-leaf;
  # Behind every number of bytes around the sizes in which contents are read.
  over-borders = builds ''
    mkdir $out
    for size in 4096 32768 65536 131072; do
      for back in 96 80 64 40 33 32 31 16 8 1 0; do
        { head -c $((size - back)) /dev/zero | tr '\0' x; echo ${leaf}; } > $out/$size-$back
      done
    done
  '' { };
  over-a-border-only-there = builds "{ head -c $((65536 - 100)) /dev/zero; printf ${hash leaf}; } > $out" with-leaf;
  twice = builds "echo ${leaf} ${leaf} ${tree} > $out" { };
  # Not found, and so not there.
  compressed = builds "echo ${leaf} | gzip -n > $out" { };
  in-upper-case = builds "echo ${leaf} | tr a-z A-Z > $out" { };
  cut = builds "echo ${builtins.substring 0 31 (hash leaf)} > $out" with-leaf;
  of-two-bytes = builds "echo ${leaf} | sed 's/./&\\x00/g' > $out" { };
  split-in-two-files = builds "mkdir $out; printf ${builtins.substring 0 16 (hash leaf)} > $out/a; printf ${builtins.substring 16 16 (hash leaf)} > $out/b" with-leaf;
  # Of what only inputs refer to.
  indirect = builds "echo ${hash source} > $out" with-leaf;
  # No input: that it exists in the store means nothing.
  of-no-input = builds "echo ${builtins.unsafeDiscardStringContext "${leaf}"} > $out" { };
  of-its-derivation = builds "echo ${builtins.unsafeDiscardOutputDependency leaf.drvPath} > $out" { };
  of-one-output = builds "echo ${tree.dev} > $out" { };
  discarded = builds (prelude + "echo ${leaf} $out > $out") (structured // { unsafeDiscardReferences.out = true; });
  discarded-of-one = builds (prelude + "echo ${leaf} > $out; echo ${leaf} > ${builtins.placeholder "dev"}") (structured // {
    outputs = [ "out" "dev" ]; unsafeDiscardReferences = { dev = true; out = false; };
  });
  discarded-in-vain = builds "echo ${leaf} > $out" { unsafeDiscardReferences = "1"; };
}
