# Outputs that are fixed by a hash: by every method and algorithm, right and wrong.
lib: with lib;
let
  text = "fixed\n";
  of = algorithm: builtins.hashString algorithm text;
  flat = algorithm: fixed "flat" algorithm (of algorithm);
  file = "echo fixed > $out";
  # The tree that the hashes below are of (`nix hash path`, `git write-tree`).
  dir = "mkdir -p $out/sub; echo fixed > $out/a; printf '#!\\n' > $out/run; chmod 755 $out/run; ln -s a $out/link; printf x > $out/sub/f";
  nar-of-dir = "sha256-L9Lqvy7SuD9SLVLSgDLQameSOmYR7/3OMnAItZZJfH4=";
  sri = hash: { outputHashMode = "recursive"; outputHash = hash; };
  wrong = "sha256-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
  checked = script: builds "${script}; ${file}" (flat "sha256");
in {
  flat = builds file (flat "sha256");
  flat-sha1 = builds file (flat "sha1");
  flat-md5 = builds file (flat "md5");
  flat-sha512 = builds file (flat "sha512");
  # Spellings of one hash: base 32, SRI with no algorithm beside it.
  flat-in-base-32 = builds file (fixed "flat" "sha256" (builtins.convertHash { hash = of "sha256"; hashAlgo = "sha256"; toHashFormat = "nix32"; }));
  flat-in-sri = builds file { outputHash = builtins.convertHash { hash = of "sha256"; hashAlgo = "sha256"; toHashFormat = "sri"; }; };
  nar = builds dir (sri nar-of-dir);
  nar-as-a-mode = builds dir (fixed "nar" null nar-of-dir);
  nar-of-a-file = builds file (sri "sha256-N8z8zjE1gJtQA9jNt9BzmdII3NGO59dM4e9+iSUVwx8=");
  nar-of-an-executable = builds "${file}; chmod 755 $out" (sri "sha256-Mml7mpo4wepJRwp5615ASFCguEcTTF7OSPxWGzR8BMI=");
  nar-of-a-symlink = builds "ln -s /no/where $out" (sri "sha256-knqwm4gygirjNRzqhdF4ib431cF6Mtl4itwvW2nWFhA=");
  nar-sha1 = builds dir (sri "sha1-b5MlBG17cP62MBIwN6VnUnTu2T0=");
  nar-md5 = builds dir (sri "md5-8v4Y2swer7rwNXEA0bjxwg==");
  nar-sha512 = builds dir (sri "sha512-/o00NsQnodiGZ8rYzc2CkysaGRUujh4NkOKTfvh3GqlREsMUw3T6J9KXgwbeGSORUoEt/RBAVvTvtH5z6ScUFw==");
  text = builds file (fixed "text" "sha256" (of "sha256"));
  git = builds dir (fixed "git" "sha1" "1b70d36813ed9f1f9729a56ca5f32c91a9ac8543");
  git-of-a-file = builds file (fixed "git" "sha1" "eaaa2f850255dbabab16074c24aaa935b9804f3d");
  git-sha256 = builds dir (fixed "git" "sha256" "bc80be5e0633191213e52fc2a0bded18dd2ee7e6156598f3b4203e4b65090dfd");

  # What was got is kept under the path that it has by its own hash.
  wrong-hash = rejects "echo other than asked for > $out" (flat "sha256");
  wrong-hash-of-nar = rejects "mkdir $out; echo other > $out/f" (sri wrong);
  wrong-hash-of-git = rejects file (fixed "git" "sha1" "0000000000000000000000000000000000000001");
  # The right contents and a wrong kind of file.
  flat-executable = rejects "${file}; chmod 755 $out" (flat "sha256");
  flat-directory = rejects "mkdir $out; echo fixed > $out/f" (flat "sha256");
  flat-symlink = rejects "echo fixed > f; ln -s /build/f $out" (flat "sha256");
  text-executable = rejects "${file}; chmod 755 $out" (fixed "text" "sha256" (of "sha256"));
  # A fixed output refers to nothing.
  with-a-reference = ends "MiscFailure" "printf %s ${leaf} > $out" (fixed "flat" "sha256" (builtins.hashString "sha256" (builtins.unsafeDiscardStringContext "${leaf}")));
  with-a-reference-as-nar = rejects "echo ${leaf} > $out" (sri wrong);
  nothing-made = rejects "true" (flat "sha256");
  # Behind a network, a failure may pass.
  that-fails = ends "TransientFailure" "echo no such host; exit 1" (flat "sha256");

  says-that-it-is-checked = checked "[ \"$NIX_OUTPUT_CHECKED\" = 1 ]";
  impure-variables-unset = name: builds "[ \"$CORPUS_UNSET\" = '' ]; tr '\\0' '\\n' < /proc/$$/environ | grep -q '^CORPUS_UNSET=$'; ${file}" (flat "sha256" // { impureEnvVars = [ "CORPUS_UNSET" ]; CORPUS_UNSET = "the derivation's"; }) name;
  impure-variables = local "the variables are those of the builder, and a pod has not ours"
    (builds "[ \"$CORPUS_VARIABLE\" = 'from outside' ]; ${file}" (flat "sha256" // { impureEnvVars = "CORPUS_VARIABLE OTHER"; }));
  # Sandboxed builds have none, whatever they ask for.
  impure-variables-of-others = builds "cat /proc/$$/environ > $out" { impureEnvVars = [ "CORPUS_VARIABLE" ]; };
  another-name = name: builds file (flat "sha256" // { name = "fixed.tar.gz"; }) name;
  with-inputs = builds "read x < ${leaf}; [ $x = ${source} ]; ${file}" (flat "sha256");
  # Its etc has what names need.
  sees-the-network = checked "[ -e /etc/nsswitch.conf ]; grep -q 'hosts: files dns' /etc/nsswitch.conf";
}
