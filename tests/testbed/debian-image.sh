#!/usr/bin/env bash
# Makes the image coldstart-testbed/debian:bookworm out of Debian's packages, where no registry can be
# reached. Needs DOCKER_HOST (see engine.sh) and the docker CLI. Prints the tag; does nothing if it exists.
set -euo pipefail

TAG=coldstart-testbed/debian:bookworm
SUITE=bookworm
CACHE=${COLDSTART_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/coldstart-testbed}
HERE=$(dirname "$(realpath "$0")")
PATH=$PATH:/usr/sbin:/sbin # debootstrap's place, which a plain user's PATH on Debian lacks
priv=()
[[ $(id -u) == 0 ]] || priv=(sudo)

say() { echo "debian-image: $*" >&2; }

# The mirror and keyring that this machine's apt uses for the suite, in whatever format it is written:
# "URI KEYRING", the second part possibly empty; nothing if apt has no such suite.
mirror() {
  local format="\$(REPO_URI) \$(RELEASE) \$(COMPONENT) \$(SIGNED_BY)" uri release component keyring
  apt-get indextargets --no-release-info --format "$format" "Created-By: Packages" |
    while read -r uri release component keyring; do
      if [[ $uri =~ ^(https?|file): && $release == "$SUITE" && $component == main ]]; then
        echo "$uri $keyring"
      fi
    done | sed -n 1p
}

clean_up() {
  local mounted
  # debootstrap leaves these mounted when it is interrupted; removing the tree must not reach into them.
  for mounted in proc sys; do
    "${priv[@]}" umount -l "$root/$mounted" 2>/dev/null || true
  done
  "${priv[@]}" rm -rf --one-file-system "$root"
}

mkdir -p "$CACHE"
exec 9>"$CACHE/debian-image.lock"
flock 9
if [[ -n $(docker image ls -q "$TAG") ]]; then
  echo "$TAG"
  exit
fi

missing=()
command -v debootstrap >/dev/null || missing+=(debootstrap)
[[ -f /usr/share/keyrings/debian-archive-keyring.gpg ]] || missing+=(debian-archive-keyring)
if ((${#missing[@]})); then
  "$HERE/engine.sh" install "${missing[@]}"
fi

root=$(mktemp -d "$CACHE/debian.XXXXXX")
trap clean_up EXIT
trap 'exit 130' INT TERM # so that the trap above runs then too

read -r uri keyring <<<"$(mirror)"
options=(--variant=minbase --include=ca-certificates --force-check-gpg)
[[ ! -f ${keyring:-} ]] || options+=("--keyring=$keyring")
say "debootstrap of $SUITE from ${uri:-the default mirror}"
"${priv[@]}" debootstrap "${options[@]}" "$SUITE" "$root" ${uri:+"$uri"} >&2

# Caches, logs and what debootstrap copied from this machine. What is left of dev is Docker's to make.
"${priv[@]}" find "$root"/var/{cache/apt,cache/ldconfig,lib/apt/lists,log} -type f -delete
"${priv[@]}" rm -f "$root"/etc/{hostname,resolv.conf}
"${priv[@]}" chmod 755 "$root" # mktemp's 0700 would shut out every user but root
id=$("${priv[@]}" tar -C "$root" --one-file-system --numeric-owner --sort=name --exclude='./dev/*' -c . |
  docker import --change 'CMD ["bash"]' -)
docker tag "$id" "$TAG" # only now: a tar that failed halfway must not pass for the image
echo "$TAG"
