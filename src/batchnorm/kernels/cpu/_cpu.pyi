from typing import TypedDict

class BuildInfo(TypedDict):
    compiler: str
    cxx_standard: int
    openmp: int
    max_threads: int

def build_info() -> BuildInfo: ...
def team_size() -> int: ...
