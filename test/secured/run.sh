#!/usr/bin/env bash
# The shipped policies on trial before Fast DDS's own security plugins: a party with the node's enclave, one for each other, and
# intruders. Run by hand, see docs/security.md:  test/secured/run.sh KEYSTORE
# KEYSTORE: made by `ros2 security` from config/security. Needs g++, libfastrtps-dev (Debian, Ubuntu: Fast DDS 2 with security).
set -euo pipefail
keystore=$(realpath "$1")/enclaves/statekv here=$(dirname "${BASH_SOURCE[0]}") work=$(mktemp -d)
trap 'kill $(jobs -p) 2> /dev/null; rm -rf "$work"' EXIT
g++ -std=c++17 -o "$work/party" "$here/party.cpp" -lfastrtps -lfastcdr
domain=${ROS_DOMAIN_ID:-0} seconds=${SECONDS_EACH:-8}

# Ends of the node's topics and services, and of others; `rq/...Request` is what a service's caller writes.
ask=rq/statekv/ask/_action/send_goalRequest set=rq/statekv/set_parametersRequest change=rq/statekv/change_stateRequest
"$work/party" "$keystore/node" "$domain" $(( 7 * seconds )) "sub:$ask" "sub:$set" "sub:$change" sub:rt/front/image_raw pub:rt/statekv/answer \
  pub:rt/cmd_vel > "$work/node" 2> /dev/null &
node=$!
others() { echo "-- $1"; shift; "$work/party" "$@" 2> /dev/null; }
others 'the page' "$keystore/view" "$domain" "$seconds" "pub:$ask" "pub:$set" "pub:$change" pub:rt/front/image_raw sub:rt/statekv/answer \
  pub:rt/statekv/answer
others 'a planner' "$keystore/client" "$domain" "$seconds" "pub:$ask" "pub:$set" sub:rt/front/image_raw
others 'the bag player' "$keystore/bag" "$domain" "$seconds" pub:rt/front/image_raw "pub:$ask" sub:rt/statekv/answer
others 'an intruder without security' - "$domain" "$seconds" "pub:$ask" pub:rt/front/image_raw sub:rt/statekv/answer
if [ -n "${STRANGER:-}" ]; then     # another keystore, of the same names
  others 'a planner of another keystore' "$STRANGER/enclaves/statekv/client" "$domain" "$seconds" "pub:$ask"
  others 'a bag player of another keystore' "$STRANGER/enclaves/statekv/bag" "$domain" "$seconds" pub:rt/front/image_raw
fi
wait $node
echo '-- the node'
cat "$work/node"
