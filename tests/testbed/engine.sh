#!/usr/bin/env bash
# A Docker Engine for the tests: the one that already answers, or a dockerd of the project's own.
#   engine.sh start             prints the DOCKER_HOST to use, and nothing else, on stdout
#   engine.sh stop              ends the project's own dockerd; never one that it did not start
#   engine.sh status            says which engine answers; exit code 3 if none does
#   engine.sh install PKG...    installs system packages
set -euo pipefail

CACHE=${COLDSTART_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/coldstart-testbed}
RUN=/run/coldstart # short: a socket's path has at most 107 bytes
DATA=$CACHE/docker
LOG=$CACHE/dockerd.log
PIDFILE=$RUN/docker.pid
CONTAINERD_PIDFILE=$RUN/exec/containerd/containerd.pid
OURS=unix://$RUN/docker.sock
DEFAULT=unix:///var/run/docker.sock
PATH=$PATH:/usr/sbin:/sbin # dockerd and iptables live there; a plain user's PATH on Debian lacks both

say() { echo "engine: $*" >&2; }
die() {
  say "$*"
  exit 1
}

priv=() # before a command that only root may run
[[ $(id -u) == 0 ]] || priv=(sudo)

# A zombie has no command line. Where PID 1 does not reap, ours may stay one.
alive() { [[ -n $(tr -d '\0' 2>/dev/null <"/proc/$1/cmdline") ]]; }

install_packages() {
  command -v apt-get >/dev/null || die "no apt-get here; install by hand: $*"
  say "installing system packages: $*"
  "${priv[@]}" apt-get update -qq >&2
  "${priv[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >&2
}

# answers HOST [PREFIX...]: PREFIX runs the probe as someone else
answers() {
  local host=$1 probe
  shift
  case $host in
    unix://*)
      [[ -S ${host#unix://} ]] || return 1
      probe=(curl --unix-socket "${host#unix://}" http://localhost/_ping)
      ;;
    *) probe=(curl "http://${host#tcp://}/_ping") ;;
  esac
  if [[ $host == unix://* || $host == tcp://* && -z ${DOCKER_TLS_VERIFY:-} ]] && command -v curl >/dev/null; then
    [[ $("$@" "${probe[@]}" -fsS --max-time 10 --noproxy '*' 2>/dev/null) == OK ]]
  elif command -v docker >/dev/null; then
    "$@" env DOCKER_HOST="$host" docker info >/dev/null 2>&1
  else
    return 1
  fi
}

find_engine() {
  local host
  for host in "${DOCKER_HOST:-$DEFAULT}" "$DEFAULT" "$OURS"; do
    if answers "$host"; then
      echo "$host"
      return 0
    fi
  done
  return 1
}

# live PIDFILE PROGRAM ARGUMENT: prints the pid if it is PROGRAM and ARGUMENT is in its command line.
# A pid alone proves nothing: after a crash or a reboot it may belong to somebody else.
live() {
  local pid argv
  pid=$(cat "$1" 2>/dev/null) || return 1
  [[ $pid =~ ^[0-9]+$ ]] || return 1
  mapfile -d '' -t argv 2>/dev/null <"/proc/$pid/cmdline" || return 1
  [[ ${argv[0]:-} == *"$2" && " ${argv[*]} " == *" $3"* ]] || return 1
  echo "$pid"
}
own_dockerd() { live "$PIDFILE" dockerd "--data-root $DATA "; }
any_dockerd() { live "$PIDFILE" dockerd ""; }
own_containerd() { live "$CONTAINERD_PIDFILE" containerd "--config $RUN/exec/"; }

# end PID SECONDS: politely, then not
end() {
  local i
  "${priv[@]}" kill "$1" 2>/dev/null || return 0
  for ((i = 0; i < $2 * 5; i++)); do
    alive "$1" || return 0
    sleep 0.2
  done
  say "process $1 did not end within $2 s: killing it"
  "${priv[@]}" kill -KILL "$1" 2>/dev/null || true
  sleep 0.5
}

# What a dockerd that crashed leaves behind keeps the next one from starting.
clean_up() {
  local pid
  if pid=$(own_containerd); then
    say "ending the containerd ($pid) that was left over"
    end "$pid" 20
  fi
  "${priv[@]}" rm -f "$PIDFILE" "$CONTAINERD_PIDFILE" "$RUN/docker.sock"
}

start() {
  local host missing=() i

  mkdir -p "$CACHE"
  exec 9>"$CACHE/engine.lock" # two starts at once would fight over the bridge
  flock 9
  if host=$(find_engine); then
    say "an engine already answers"
    echo "$host"
    return
  fi
  if [[ $(id -u) != 0 ]] && answers "$DEFAULT" sudo; then
    die "an engine answers at $DEFAULT, but not to you: join its group (docker) and log in again"
  fi
  if [[ -n ${DOCKER_HOST:-} && $DOCKER_HOST != "$OURS" ]]; then
    say "nothing answers at DOCKER_HOST=$DOCKER_HOST: starting an engine of the project's own"
  fi

  command -v dockerd >/dev/null || missing+=(docker.io)
  command -v iptables >/dev/null || missing+=(iptables)
  command -v curl >/dev/null || missing+=(curl)
  if ((${#missing[@]})); then
    install_packages "${missing[@]}" 9>&- # it may start a service, which would keep the lock
    # Where an init system runs, installing the package starts its service.
    for ((i = 0; i < 10; i++)); do
      if answers "$DEFAULT"; then
        echo "$DEFAULT"
        return
      fi
      [[ -d /run/systemd/system ]] || break
      sleep 1
    done
  fi

  if any_dockerd >/dev/null; then
    own_dockerd >/dev/null || die "the dockerd in $PIDFILE is of another cache than $CACHE; stop it there"
    die "our dockerd ($(own_dockerd)) runs but does not answer; see $LOG, or: engine.sh stop"
  fi
  clean_up
  "${priv[@]}" mkdir -p "$RUN"
  say "starting dockerd, log in $LOG"
  # A session of its own, so that it outlives the shell; without the lock, which it would keep for ever.
  "${priv[@]}" setsid nohup dockerd --data-root "$DATA" --exec-root "$RUN/exec" --pidfile "$PIDFILE" \
    -H "$OURS" --group "$(id -g)" </dev/null >>"$LOG" 2>&1 9>&- &
  for ((i = 0; i < 300; i++)); do
    if answers "$OURS"; then
      echo "$OURS"
      return
    fi
    alive $! || break
    sleep 0.2
  done
  tail -n 30 "$LOG" >&2
  die "dockerd did not come up; the end of its log is above"
}

stop() {
  local pid
  if pid=$(own_dockerd); then
    say "stopping dockerd ($pid)"
    end "$pid" 60
  elif any_dockerd >/dev/null; then
    die "the dockerd in $PIDFILE is of another cache than $CACHE: left alone"
  else
    say "no dockerd of ours runs"
  fi
  clean_up
}

status() {
  local host pid
  pid=$(own_dockerd) && say "our dockerd runs: pid $pid, data in $DATA, log in $LOG"
  host=$(find_engine) || {
    say "no engine answers"
    return 3
  }
  echo "$host"
}

case ${1:-} in
  start | stop | status) "$1" ;;
  install) install_packages "${@:2}" ;;
  *) die "usage: engine.sh start | stop | status | install PKG..." ;;
esac
