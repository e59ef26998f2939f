# x86-64 with an NVIDIA GPU: PyTorch brings CUDA along, the host its driver and NVIDIA's container toolkit.
# From the repository: docker build --file docker/cuda.Dockerfile --tag statekv:cuda .
ARG ROS_DISTRO=jazzy
FROM ros:${ROS_DISTRO}-ros-base
ARG PIP_ARGS=""
COPY . /opt/statekv/source
RUN /opt/statekv/source/docker/install.sh /opt/statekv/source /opt/statekv \
    && useradd --create-home --uid 10001 statekv \
    && install --directory --owner statekv --mode 700 /memory
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001
WORKDIR /home/statekv
VOLUME /memory
HEALTHCHECK --interval=30s --timeout=15s --start-period=300s CMD ["/opt/statekv/run", "statekv-health"]
STOPSIGNAL SIGINT
ENTRYPOINT ["/opt/statekv/run"]
CMD ["statekv-node", "--ros-args", "-p", "memory_dir:=/memory"]
