# Without a GPU. PIP_ARGS names the index of PyTorch's CPU builds; without it the image is larger by the CUDA that PyTorch brings.
# From the repository: docker build --file docker/cpu.Dockerfile --tag statekv:cpu --build-arg PIP_ARGS="--extra-index-url ..." .
ARG ROS_DISTRO=jazzy
FROM ros:${ROS_DISTRO}-ros-base
ARG PIP_ARGS=""
COPY . /opt/statekv/source
RUN /opt/statekv/source/docker/install.sh /opt/statekv/source /opt/statekv \
    && useradd --create-home --uid 10001 statekv \
    && install --directory --owner statekv --mode 700 /memory
USER 10001
WORKDIR /home/statekv
VOLUME /memory
HEALTHCHECK --interval=30s --timeout=15s --start-period=300s CMD ["/opt/statekv/run", "statekv-health"]
STOPSIGNAL SIGINT
ENTRYPOINT ["/opt/statekv/run"]
CMD ["statekv-node", "--ros-args", "-p", "memory_dir:=/memory"]
