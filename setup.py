"""Packaging: everything that describes the project is read from settings.ini."""

import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
EXTRAS = ("offline", "gguf", "book", "sweep", "dev")


class BuildWithNotebooks(build_py):
    """Copy the experiment notebooks into the wheel, where `lpft-nb` finds them without a checkout."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "lpft_nb" / "_notebooks"
        target.mkdir(parents=True, exist_ok=True)
        for notebook in sorted((ROOT / "nbs" / "experiments").glob("*.ipynb")):
            shutil.copyfile(notebook, target / notebook.name)


parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(ROOT / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
readme = ROOT / "README.md"

setup(
    name=settings["repo"],
    version=settings["version"],
    description=settings["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.is_file() else "",
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=settings["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Natural Language :: English",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=f">={settings['min_python']}",
    packages=find_packages(include=["lpft_nb", "lpft_nb.*"]),
    package_data={"lpft_nb": ["py.typed"]},  # type checkers may read the annotations
    install_requires=settings["requirements"].split(),
    extras_require={extra: settings[f"{extra}_requirements"].split() for extra in EXTRAS},
    entry_points={"console_scripts": settings["console_scripts"].split()},
    cmdclass={"build_py": BuildWithNotebooks},
)
