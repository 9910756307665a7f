# Outputs that are named by what they turn out to be.
lib: with lib;
let
  of = mode: algorithm: floating // { outputHashMode = mode; outputHashAlgo = algorithm; };
  file = "echo floating > $out";
  dir = "mkdir -p $out/sub; echo floating > $out/a; printf '#!\\n' > $out/run; chmod 755 $out/run; ln -s a $out/link; printf x > $out/sub/f";
  first = make "floating-first" "echo first, from ${leaf} > $out" floating;
  alike = make "floating-first" "echo first, 'from' ${leaf} > $out" floating;
  second = make "floating-second" "mkdir $out $dev; cat ${first} > $out/f; echo ${first} > $dev/g; echo $dev > $out/h" (floating // { outputs = [ "out" "dev" ]; });
in {
  nar = builds dir floating;
  nar-of-a-file = builds file floating;
  nar-sha1 = builds dir (of "nar" "sha1");
  nar-md5 = builds dir (of "nar" "md5");
  nar-sha512 = builds dir (of "nar" "sha512");
  flat = builds file (of "flat" "sha256");
  flat-sha1 = builds file (of "flat" "sha1");
  flat-sha512 = builds file (of "flat" "sha512");
  text = builds file (of "text" "sha256");
  text-with-references = builds "echo ${leaf} > $out" (of "text" "sha256");
  git = builds dir (of "git" "sha1");
  git-of-a-file = builds file (of "git" "sha1");
  git-sha256 = builds dir (of "git" "sha256");

  references = builds "echo ${leaf} ${tree.dev} > $out" floating;
  environment = builds "cat /proc/$$/environ /proc/$$/cmdline > $out" (floating // { mine = "${builtins.placeholder "out"}/x"; });
  files = builds "cat $textPath > $out; cat /proc/$$/environ >> $out" (floating // { passAsFile = [ "text" ]; text = "<${builtins.placeholder "out"}>"; });
  structured = builds (prelude + "cat $NIX_ATTRS_JSON_FILE $NIX_ATTRS_SH_FILE > $out") (structured // floating // { mine = builtins.placeholder "out"; });
  discarded = builds (prelude + "echo ${leaf} > $out") (structured // floating // { unsafeDiscardReferences.out = true; });

  is-itself = builds "mkdir $out; echo $out > $out/f; ln -s $out/f $out/link; echo before $out and after > $out/g" floating;
  is-itself-in-binary = builds "head -c 70000 ${tools}/bin/busybox > $out; printf $out >> $out; head -c 65536 /dev/zero >> $out; echo $out >> $out" floating;
  outputs = builds "mkdir $out; echo $out > $dev; echo $dev ${leaf} > $doc; echo doc > $out/doc" (floating // { outputs = [ "out" "dev" "doc" ]; });
  outputs-and-itself = builds "echo $out $dev > $out; echo $dev > $dev" (floating // { outputs = [ "out" "dev" ]; });
  outputs-in-names = builds "mkdir -p $out/sub; echo dev > $dev; touch $out/$(basename $dev); ln -s $dev $out/sub/link" (floating // { outputs = [ "out" "dev" ]; });
  outputs-alike = builds "echo same > $out; echo same > $dev" (floating // { outputs = [ "out" "dev" ]; });
  allowed = builds "echo $dev > $out; echo dev > $dev" (floating // { outputs = [ "out" "dev" ]; allowedReferences = [ "dev" ]; });
  disallowed = rejects "echo $dev > $out; echo dev > $dev" (floating // { outputs = [ "out" "dev" ]; disallowedReferences = [ "dev" ]; });

  chain = builds "cat ${first} ${second}/f ${second.dev}/g > $out; echo ${second} >> $out" floating;
  # The same contents by two derivations are one object, and what uses them cannot tell.
  alike = builds "echo ${first} ${alike} > $out" floating;
  # Its own path is known when its input's is.
  below-input-addressed = builds "echo $out ${first} > $out" { };
  below-fixed = builds "cat ${first} > /dev/null; echo fixed > $out" (fixed "flat" "sha256" (builtins.hashString "sha256" "fixed\n"));
  below-structured = builds (prelude + "cat $NIX_ATTRS_JSON_FILE > $out") (structured // { inputs = [ first second.dev ]; });

  flat-directory = rejects "mkdir $out" (of "flat" "sha256");
  flat-executable = rejects "${file}; chmod 755 $out" (of "flat" "sha256");
  flat-with-references = ends "MiscFailure" "echo ${leaf} > $out" (of "flat" "sha256");
  text-of-itself = ends "MiscFailure" "echo $out > $out" (of "text" "sha256");
  cycle = rejects "echo $dev > $out; echo $out > $dev" (floating // { outputs = [ "out" "dev" ]; });
  that-fails = fails "exit 3" floating;
  nothing-made = rejects "true" floating;
}
