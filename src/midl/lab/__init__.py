"""The lab: data sets, training, measurements and reports built on the library, which never imports it."""
