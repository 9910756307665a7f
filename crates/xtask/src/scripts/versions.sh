export LC_ALL=C
# Unpacking alone records nothing; the suite's own list, which goes when mmdebstrap is done, has one version of each.
ls "$1/usr/share/doc" | sort >"$1/listed"
cat "$1"/var/lib/apt/lists/*_Packages | awk '/^Package: /{p=$2} /^Version: /{print p, $2}' | sort -u | join - "$1/listed" >"$1/versions"
rm "$1/listed"
