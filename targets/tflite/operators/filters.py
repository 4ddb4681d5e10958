"""Global filters: real discrete Fourier transforms as matrix products, and the product with K."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from ai_edge_litert import schema_py_generated as schema

from gfcompile.targets.onnx_values import constant, shape_of
from gfcompile.targets.spectral import irfft_matrices, rfft_matrices
from gfcompile.targets.tflite.emitter import Emitter, input_of, lowers, stored_array
from gfcompile.targets.tflite.model_file import Array, Tensor
import os

@lowers("GlobalFilterDft")
def lower_dft_filter(emit: Emitter, node: ir.Node) -> None:
    x = input_of(node, 0)
    batch, h, w, c = shape_of(x)
    name = str(node.outputs[0].name)
    weights = []
    for value in node.inputs[1:]:
        array = constant(value)
        assert array is not None and value is not None
        weights.append((str(value.name), stored_array(value, array)))
    (re_name, k_re), (im_name, k_im) = weights
    if os.environ.get('K5F','s') == 'd':
        _dense(emit, node, name, (batch,h,w,c), re_name, k_re, im_name, k_im)
    else:
        _separable(emit, node, name, (batch,h,w,c), re_name, k_re, im_name, k_im)


def bin_(emit, op, a, b, name):
    r = emit.file.tensor(name, 'float32', np.broadcast_shapes(a.shape, b.shape))
    emit.operator(op, [a, b], [r], getattr(schema, op.title()+'OptionsT')())
    return r

def _complex(emit, name, re, im, kr, ki):
    a = bin_(emit,'MUL',re,kr,name+'/a'); b = bin_(emit,'MUL',im,ki,name+'/b')
    c = bin_(emit,'MUL',re,ki,name+'/c'); d = bin_(emit,'MUL',im,kr,name+'/d')
    return bin_(emit,'SUB',a,b,name+'/re'), bin_(emit,'ADD',c,d,name+'/im')

def _dense(emit, node, name, shape, re_name, k_re, im_name, k_im):
    batch,h,w,c = shape; W=w//2+1
    x = emit.reshape(emit.real(node.inputs[0]), (batch,h*w,c), name+'/tokens')
    t = emit.transpose(x, (0,2,1), name+'/t')
    eye = np.eye(h*w).reshape(h*w,h,w)
    spec = np.fft.rfft2(eye, norm='ortho').reshape(h*w, h*W)
    n=h*W
    def fc(inp, m, nm):
        r = emit.file.tensor(nm,'float32',(*inp.shape[:-1], m.shape[0]))
        o=schema.FullyConnectedOptionsT(); o.keepNumDims=True
        emit.operator('FULLY_CONNECTED',[inp, emit.file.constant(nm+'/m', np.ascontiguousarray(m.astype(np.float32))), None],[r],o)
        return r
    re = fc(t, spec.real.T, name+'/sre'); im = fc(t, spec.imag.T, name+'/sim')
    kr = emit.weights(re_name, np.ascontiguousarray(k_re.transpose(2,0,1).reshape(c,n)))
    ki = emit.weights(im_name, np.ascontiguousarray(k_im.transpose(2,0,1).reshape(c,n)))
    yr, yi = _complex(emit,name,re,im,kr,ki)
    e = np.eye(n).reshape(n,h,W)
    gr = np.fft.irfft2(e, s=(h,w), norm='ortho').reshape(n,h*w); gi = np.fft.irfft2(1j*e, s=(h,w), norm='ortho').reshape(n,h*w)
    cat = emit.file.tensor(name+'/cat','float32',(batch,c,2*n)); o=schema.ConcatenationOptionsT(); o.axis=2
    emit.operator('CONCATENATION',[yr,yi],[cat],o)
    y = fc(cat, np.concatenate([gr,gi]).T, name+'/y')
    y = emit.transpose(y,(0,2,1),name+'/yt')
    emit.hold(node.outputs[0], emit.reshape(y, shape, name))

def _separable(emit, node, name, shape, re_name, k_re, im_name, k_im):
    batch,h,w,c = shape; W=w//2+1
    def bmm(m, inp, nm):
        r = emit.file.tensor(nm,'float32',(*inp.shape[:-2], m.shape[-2], inp.shape[-1]))
        m = m.astype(np.float32)
        m = np.ascontiguousarray(np.broadcast_to(m, (*inp.shape[:-2],*m.shape))) if os.environ.get('K5T') else m.reshape((1,)*(len(inp.shape)-2)+m.shape)
        emit.operator('BATCH_MATMUL',[emit.file.constant(nm+'/m', m), inp],[r],schema.BatchMatMulOptionsT())
        return r
    x = emit.reshape(emit.real(node.inputs[0]), (batch*h,w,c), name+'/rows')
    fr, fi = rfft_matrices(w)  # (w, W)
    s = bmm(np.concatenate([fr.T, fi.T]), x, name+'/rowdft')   # (B*h, 2W, C)
    s = emit.reshape(s, (batch, 2*h, W*c), name+'/cols')    # rows (h, part)
    theta = -2*np.pi*(np.outer(np.arange(h),np.arange(h))%h)/h
    F = np.exp(1j*theta)/np.sqrt(h)   # (k, n)
    # re_k = sum Fr re - Fi im ; im_k = Fi re + Fr im ; columns (n, part)
    Mre = np.stack([F.real, -F.imag], -1).reshape(h, 2*h)
    Mim = np.stack([F.imag, F.real], -1).reshape(h, 2*h)
    re = bmm(Mre, s, name+'/re0'); im = bmm(Mim, s, name+'/im0')
    kr = emit.weights(re_name, k_re.reshape(h, W*c)); ki = emit.weights(im_name, k_im.reshape(h,W*c))
    yr, yi = _complex(emit,name,re,im,kr,ki)
    G = F.conj().T  # (n,k)
    # rows (n, part): re_n = Gr yr - Gi yi ; im_n = Gi yr + Gr yi
    Nr = np.stack([G.real, G.imag], 1).reshape(2*h, h); Ni = np.stack([-G.imag, G.real],1).reshape(2*h,h)
    if os.environ.get('K5C'):
        cat = emit.file.tensor(name+'/cat','float32',(batch,2*h,W*c)); o=schema.ConcatenationOptionsT(); o.axis=1
        emit.operator('CONCATENATION',[yr,yi],[cat],o)
        z = bmm(np.concatenate([Nr,Ni],1), cat, name+'/z')
    else:
        z = bin_(emit,'ADD',bmm(Nr,yr,name+'/zr'),bmm(Ni,yi,name+'/zi'),name+'/z')
    z = emit.reshape(z,(batch*h,2*W,c),name+'/zrows')
    gr, gi = irfft_matrices(w)  # (W, w)
    y = bmm(np.concatenate([gr,gi]).T, z, name+'/y')
    emit.hold(node.outputs[0], emit.reshape(y, shape, name))
