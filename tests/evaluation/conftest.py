from evaluation_world import world

__all__ = ["world"]
