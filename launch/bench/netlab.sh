#!/usr/bin/env bash
# Hosts on one slow network, inside one machine: every host is a network namespace with a link to a common bridge, and a
# token bucket on both ends of the link holds it to RATE in each direction. Needs root and iproute2 (ip, tc); touches
# nothing outside its own namespaces.
#
#   netlab.sh up N RATE        make hosts 0 .. N-1, say at 1gbit; what an earlier `up` of that name left is removed first
#   netlab.sh run HOST CMD...  run CMD on one host, in place of this shell; GLOO_SOCKET_IFNAME is set
#   netlab.sh down             remove the hosts; there may be none
#
# $NETLAB_NAME tells networks apart. It ends in the process id of its owner, by default the process that calls this
# script; `up` also removes networks whose owner is gone (killed before it could call `down`).
set -euo pipefail
name=${NETLAB_NAME:-lowbit-$PPID}

remove() { # PATTERN of namespaces; links and queues go with them
  local namespace
  for namespace in $(ip netns list | awk '{print $1}' | grep -E "^$1\$"); do ip netns del "$namespace" || true; done
}

runs() { # PID; a zombie does not: in a container whose first process collects no orphans, one stays for good
  [[ "$(sed 's/.*) //' "/proc/$1/stat" 2>/dev/null || true)" == [!ZX]* ]]
}

remove_abandoned() {
  local network
  for network in $(ip netns list | sed -nE 's/^(lowbit-[0-9]+)-.*/\1/p' | sort -u); do
    runs "${network#lowbit-}" || remove "$network-.*"
  done
}

bytes_per_ms() { # of a rate in mbit or gbit
  case $1 in
  *gbit) echo $((${1%gbit} * 125000)) ;;
  *mbit) echo $((${1%mbit} * 125)) ;;
  *) echo "rate $1 is not of the form 100mbit or 1gbit" >&2 && return 2 ;;
  esac
}

up() {
  local hosts=$1 rate=$2 burst host
  # The bucket holds 0.1 ms, and at least 64 KiB: with less, a busy machine's late timers lose much of the rate. What it
  # holds passes at once. A packet, as the kernel hands it over (gso_max_size), is never more than half of it.
  burst=$(($(bytes_per_ms "$rate") / 10))
  burst=$((burst < 65536 ? 65536 : burst))
  local bucket="tbf rate $rate burst $burst latency 50ms" packet=$((burst < 131072 ? burst / 2 : 65536))
  ip netns add "$name-hub"
  ip -n "$name-hub" link add hub type bridge
  ip -n "$name-hub" link set hub up
  for ((host = 0; host < hosts; host++)); do
    ip netns add "$name-$host"
    ip link add e0 netns "$name-$host" type veth peer name "p$host" netns "$name-hub"
    ip -n "$name-hub" link set "p$host" master hub up
    ip -n "$name-$host" addr add "10.77.0.$((host + 1))/24" dev e0
    ip -n "$name-$host" link set lo up
    ip -n "$name-$host" link set e0 gso_max_size "$packet" up
    # shellcheck disable=SC2086
    ip netns exec "$name-$host" tc qdisc add dev e0 root $bucket
    # shellcheck disable=SC2086
    ip netns exec "$name-hub" tc qdisc add dev "p$host" root $bucket
  done
}

case ${1:-} in
up)
  remove "$name-.*"
  remove_abandoned
  trap 'code=$?; [ "$code" = 0 ] || remove "$name-.*"; exit "$code"' EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM HUP
  up "${2:?hosts}" "${3:?rate}"
  ;;
run)
  host=${2:?host}
  shift 2
  GLOO_SOCKET_IFNAME=e0 exec ip netns exec "$name-$host" "$@"
  ;;
down) remove "$name-.*" ;;
*) sed -n 's/^#   //p' "$0" >&2 && exit 2 ;;
esac
