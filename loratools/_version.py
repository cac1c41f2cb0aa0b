"""The version of loratools, where everything else can import it from without importing the package's face."""

__version__ = "0.1.0"
