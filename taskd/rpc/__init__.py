"""Calls between processes: gRPC over HTTP/2, bodies as raw bytes."""

# Before any module of this folder imports grpclib, which binds asyncio functions at import that
# trio-asyncio has to replace first (Python 3.12 and newer).
from taskd import aio as aio
