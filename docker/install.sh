#!/usr/bin/env bash
# Installs statekv_ros on a machine of its own, as root: `docker/install.sh SOURCE PREFIX`. The images of this folder, CI and
# `make docker-check` all run this file.
#   SOURCE: a clone. PREFIX: gets venv/, and install/ where ROS is a distribution's; `PREFIX/run COMMAND` runs a command in them.
#   ROS_DISTRO: of /opt/ros, whose workspace is built with colcon; where there is none, ROS comes as wheels (x86-64).
#   PIP_ARGS: for pip, for example another index for another build of torch.
set -euo pipefail

source=$(realpath "$1") prefix=$(realpath --canonicalize-missing "$2")
distro=/opt/ros/${ROS_DISTRO:-none}
export DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
read -ra pip_args <<< "${PIP_ARGS:-}"

apt-get update
if [ -f "$distro/setup.bash" ]; then
  apt-get install --yes --no-install-recommends python3-venv python3-rosdep python3-colcon-common-extensions g++
  [ -e /etc/ros/rosdep/sources.list.d/20-default.list ] || rosdep init
  rosdep update --rosdistro "$ROS_DISTRO"
  # Types of dependencies: tests and documents are not for a robot.
  rosdep install --from-paths "$source" --ignore-src --default-yes --rosdistro "$ROS_DISTRO" \
    --dependency-types=buildtool --dependency-types=build --dependency-types=build_export --dependency-types=exec
  python3 -m venv --system-site-packages "$prefix/venv"
  # What the page needs, as pyproject.toml names it.
  mapfile -t page < <(python3 -c "import sys, tomllib; print(*tomllib.load(open(sys.argv[1], 'rb'))['project'][
    'optional-dependencies'].get('view', []), sep='\n')" "$source/pyproject.toml" | grep .)
  # What the distribution has stays as it is: its compiled modules need its NumPy. The rest at the versions that were tested together.
  apart='^(numpy|opencv-python|pillow|pyyaml|rich|tqdm|packaging|typing-extensions|ros-[a-z0-9-]+)=='
  [ -z "$(python3 -c 'import torch' 2>&1)" ] && apart="$apart|^(torch|triton)=="
  grep -Ev "$apart" "$source/constraints.txt" > /tmp/constraints.txt
  echo 'numpy<2' >> /tmp/constraints.txt
  "$prefix/venv/bin/pip" install --constraint /tmp/constraints.txt "${pip_args[@]}" \
    torch transformers triton safetensors regex rosbags lmdb "${page[@]}"
  set +u
  # shellcheck disable=SC1091
  . "$distro/setup.bash"
  set -u
  cd "$source"
  colcon --log-base /tmp/log build --build-base /tmp/build --install-base "$prefix/install" --merge-install \
    --packages-select statekv_ros --cmake-args -DBUILD_TESTING=OFF
  rm -rf /tmp/log /tmp/build /tmp/constraints.txt
  setup="$prefix/install/setup.bash"
  for program in "$prefix"/install/lib/statekv_ros/statekv_*; do      # the names that pip gives them
    name=$(basename "$program")
    ln -s "$program" "$prefix/venv/bin/${name//_/-}"
  done
else
  apt-get install --yes --no-install-recommends python3-venv python3-dev g++ libgl1 libglib2.0-0
  python3 -m venv "$prefix/venv"
  # PIP_CONSTRAINT holds for the build tools too.
  PIP_CONSTRAINT="$source/constraints.txt" "$prefix/venv/bin/pip" install "${pip_args[@]}" "$source[eval,view]"
  setup=/dev/null
fi
rm -rf /var/lib/apt/lists/*

cat > "$prefix/run" <<RUN
#!/usr/bin/env bash
# Runs a command of statekv_ros, or any other, where it finds ROS and Python's packages.
set -eo pipefail
. $setup
export VIRTUAL_ENV=$prefix/venv PATH=$prefix/venv/bin:\$PATH
[ -f $distro/setup.bash ] || export AMENT_PREFIX_PATH=$prefix/venv RMW_IMPLEMENTATION=rmw_fastrtps_cpp
exec "\$@"
RUN
chmod +x "$prefix/run"
