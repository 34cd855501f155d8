"""Generated from protos/jqserve/v1/jqserve.proto by protos/generate.py: do not edit."""
