# Jetson with JetPack 7 (L4T 38, Ubuntu 24.04): NVIDIA's PyTorch, built for its GPUs, with ROS beside it.
# On the board: docker build --file docker/jetson.Dockerfile --tag statekv:jetson .
ARG BASE=nvcr.io/nvidia/pytorch:25.10-py3
FROM ${BASE}
ARG ROS_DISTRO=jazzy
ARG ROS_APT_SOURCE=1.1.0
ARG PIP_ARGS=""
ENV ROS_DISTRO=${ROS_DISTRO}
ADD https://github.com/ros-infrastructure/ros-apt-source/releases/download/${ROS_APT_SOURCE}/ros2-apt-source_${ROS_APT_SOURCE}.noble_all.deb \
    /tmp/ros2-apt-source.deb
COPY . /opt/statekv/source
RUN dpkg --install /tmp/ros2-apt-source.deb \
    && apt-get update \
    && apt-get install --yes --no-install-recommends ros-${ROS_DISTRO}-ros-base \
    && /opt/statekv/source/docker/install.sh /opt/statekv/source /opt/statekv \
    && useradd --create-home --uid 10001 statekv \
    && install --directory --owner statekv --mode 700 /memory \
    && rm -rf /var/lib/apt/lists/* /tmp/ros2-apt-source.deb
USER 10001
WORKDIR /home/statekv
VOLUME /memory
HEALTHCHECK --interval=30s --timeout=15s --start-period=300s CMD ["/opt/statekv/run", "statekv-health"]
STOPSIGNAL SIGINT
ENTRYPOINT ["/opt/statekv/run"]
CMD ["statekv-node", "--ros-args", "-p", "memory_dir:=/memory"]
