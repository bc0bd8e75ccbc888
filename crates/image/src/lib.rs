//! Images: registry client, content store, confined unpack, overlay layers, garbage collection.
