# What a store object may be and becomes: types, modes, times, links, names, sizes.
lib: with lib; {
  file = builds "echo text > $out" { };
  empty-file = builds ": > $out" { };
  executable = builds "echo '#!/bin/sh' > $out; chmod 700 $out" { };
  symlink = builds "ln -s ${source} $out" { };
  dangling = builds "mkdir $out; ln -s /no/where $out/a; ln -s . $out/b; ln -s ../../../../etc/passwd $out/c" { };
  long-symlink = builds "ln -s $(printf '%04000d' 0) $out" { };
  empty-directory = builds "mkdir -p $out/a/b $out/c" { };
  modes = builds ''
    mkdir $out; cd $out
    for mode in 000 100 010 001 111 200 400 444 500 555 600 644 666 700 711 755 777; do
      echo $mode > f$mode; mkdir d$mode; echo $mode > d$mode/f; chmod $mode f$mode d$mode
    done
  '' { };
  # No owner of a file inside a namespace of one user may say these.
  special-bits = builds ''
    mkdir $out; cd $out; echo > f; mkdir d
    for bits in u+s g+s 4755 2755 6755; do chmod $bits f 2> /dev/null && echo can $bits || echo cannot $bits; done > files
    for bits in u+s g+s 2755 4755; do chmod $bits d 2> /dev/null && echo can $bits || echo cannot $bits; done > directories
    chmod 1777 d && echo can stick >> directories
  '' { };
  attributes = builds ''
    echo > $out
    { setfattr -n user.corpus -v value $out && echo can set || echo cannot set; } 2>&1 | sed 's/.*: //' > said; cat said > $out
  '' { };
  times = builds "mkdir $out; touch -d @0 $out/a; touch -d @2000000000 $out/b; ln -s a $out/c; touch -h -d @3 $out/c; touch -d @5 $out" { };
  hard-links = builds "mkdir $out; echo linked > $out/a; ln $out/a $out/b; mkdir $out/d; ln $out/a $out/d/c" { };
  hard-links-across = builds "mkdir $out $dev; echo linked > $out/a; ln $out/a $dev/a; chmod 755 $dev/a" { outputs = [ "out" "dev" ]; };
  hard-link-of-an-input = builds "ln ${source} $out 2> /dev/null || echo cannot link > $out" { };
  moved-from-the-build-directory = builds "mkdir t; echo x > t/f; mv t $out" { };
  names = builds ''
    mkdir $out; cd $out
    touch -- 'a b' "a
    b" "a'\"b" '\\' '*' '?' ' ' -n .hidden ... 'żółć' '漢字' "$(printf 'caf\351')" "$(printf '\377')" "$(printf '\001')"
    touch -- a 'a~nix~case~hack~1' A 'A~nix~case~hack~1' "$(printf '%0255d' 0)"
  '' { };
  # Order of names is that of bytes, not of anybody's language.
  sorted = builds "mkdir $out; cd $out; touch a B b A a.b a-b a_b ab aB 1 10 2 é z; mkdir a.d ad; touch a.d/x ad/y" { };
  deep = builds "mkdir $out; cd $out; for i in $(seq 60); do mkdir d; cd d; done; touch f" { };
  too-deep = ends "MiscFailure" "mkdir $out; cd $out; for i in $(seq 80); do mkdir d; cd d; done; touch f" { };
  many = builds "mkdir $out; cd $out; for i in $(seq 20); do mkdir $i; for j in $(seq 100); do echo $i $j > $i/$j; done; done" { };
  large = builds "dd if=/dev/zero bs=1M count=24 2> /dev/null > $out; echo ${source} >> $out" { };
  sparse = builds "truncate -s 40M $out" { };
  fifo = ends "MiscFailure" "mkfifo $out" { };
  fifo-below = ends "MiscFailure" "mkdir $out; mkfifo $out/f" { };
  device = builds "mknod $out c 1 3 2> /dev/null || echo cannot make devices > $out" { };
}
