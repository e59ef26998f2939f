"""A memory on disk (LMDB): whole steps and carried states, by camera. It knows nothing of models and streams."""
from statekv_ros.store.reader import StoreReader
from statekv_ros.store.store import MemoryStore

__all__ = ['MemoryStore', 'StoreReader']
